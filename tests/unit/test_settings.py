"""The environment that our programs are started with."""

from __future__ import annotations

import pytest

from infra.settings import TRAINING_ALLOCATOR, child_environment


def test_allocator_settings_are_for_training_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in TRAINING_ALLOCATOR.items():  # as a program of training inherits them
        monkeypatch.setenv(name, value)
    assert TRAINING_ALLOCATOR.items() <= child_environment("training.finetune").items()
    assert not TRAINING_ALLOCATOR.keys() & child_environment("serving.app").keys()


def test_allocator_settings_of_the_user_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_ARENA_MAX", "3")
    assert child_environment("serving.app")["MALLOC_ARENA_MAX"] == "3"
