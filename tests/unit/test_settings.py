"""The environment that our programs are started with."""

from __future__ import annotations

import importlib.util

import pytest

from infra.settings import OPENVINO_ALLOCATOR, OPENVINO_PROGRAM, TRAINING_ALLOCATOR, child_environment


def test_allocator_settings_are_for_training_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in TRAINING_ALLOCATOR.items():  # as a program of training inherits them
        monkeypatch.setenv(name, value)
    assert TRAINING_ALLOCATOR.items() <= child_environment("training.finetune").items()
    assert not TRAINING_ALLOCATOR.keys() & child_environment("serving.app").keys()


def test_allocator_settings_of_the_user_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_ARENA_MAX", "3")
    assert child_environment("serving.app")["MALLOC_ARENA_MAX"] == "3"


def test_allocator_settings_of_openvino_are_for_its_process_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert OPENVINO_ALLOCATOR.items() <= child_environment(OPENVINO_PROGRAM).items()
    assert not OPENVINO_ALLOCATOR.keys() & child_environment("serving.engines.torch_steps").keys()
    monkeypatch.setenv("MALLOC_ARENA_MAX", "3")
    assert child_environment(OPENVINO_PROGRAM)["MALLOC_ARENA_MAX"] == "3"


def test_program_of_openvino_is_a_module_that_there_is() -> None:
    assert importlib.util.find_spec(OPENVINO_PROGRAM) is not None
