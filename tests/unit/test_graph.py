from __future__ import annotations

from typing import Any

import pytest

from infra.config import Config
from infra.contracts import Kind
from infra.errors import ConfigError
from pipelines import graph
from pipelines.step import Step, identity_fields
from training.config import TrainConfig


class Nothing(Config):
    """A step without options."""


def node(name: str, produces: Kind = "dataset", **needs: Kind) -> Step:
    def run(_config: Any, _context: Any) -> None: ...

    return Step(name, 1, produces, Nothing(), run, needs=needs)


def test_order_puts_each_step_after_its_needs_and_keeps_ties() -> None:
    steps = [node("c", a="dataset", b="dataset"), node("b"), node("a"), node("d", c="dataset")]
    assert [step.name for step in graph.ordered(steps)] == ["b", "a", "c", "d"]


def test_order_reports_unknown_inputs_and_wrong_kinds_together() -> None:
    steps = [node("a"), node("b", a="adapter"), node("c", missing="dataset")]
    with pytest.raises(ConfigError) as caught:
        graph.ordered(steps)
    assert "b@1 needs 'a' to make 'adapter', but it makes 'dataset'" in caught.value.message
    assert "c@1 needs 'missing', which no step makes" in caught.value.message


def test_order_of_a_circle_names_it() -> None:
    with pytest.raises(ConfigError, match=r"circle: .*a.*b"):
        graph.ordered([node("a", b="dataset"), node("b", a="dataset")])


def test_order_of_two_steps_of_one_name_is_refused() -> None:
    with pytest.raises(ConfigError, match="two steps are called 'a'"):
        graph.ordered([node("a"), node("a")])


def test_upto_keeps_only_what_the_named_step_needs() -> None:
    steps = graph.ordered([node("a"), node("b", a="dataset"), node("x"), node("c", b="dataset")])
    assert [step.name for step in graph.upto(steps, "b")] == ["a", "b"]


def test_identity_follows_config_inputs_and_version_only() -> None:
    def step(version: int = 1, **train: Any) -> Step:
        return Step("train", version, "adapter", TrainConfig(**train), lambda *_: None, needs={"rows": "dataset"})

    same = step().identity({"rows": "1", "unrelated": "x"})
    assert step().identity({"rows": "1", "unrelated": "y"}) == same
    assert step(cpus_per_worker=7, checkpoint_steps=3, num_workers=[1, 2]).identity({"rows": "1"}) == same, (
        "how it runs is not what it makes"
    )
    assert step(epochs=3).identity({"rows": "1"}) != same
    assert step().identity({"rows": "2"}) != same
    assert step(version=2).identity({"rows": "1"}) != same


def test_identity_fields_drop_marked_fields_at_every_depth() -> None:
    class Outer(Config):
        train: TrainConfig = TrainConfig()

    fields = identity_fields(Outer())
    assert "checkpoint_steps" not in fields["train"]
    assert fields["train"]["lora"]["rank"] == 16
