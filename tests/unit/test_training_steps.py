"""Steps, batches and checkpoints are pure functions of their inputs, and the update is AdamW's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from training import checkpoint
from training.batches import BatchPlan, count_supervised, worker_packs
from training.checkpoint import TrainState
from training.config import TrainConfig
from training.data.tokens import TokenRow
from training.schedule import learning_rate, total_steps


def row(index: int, length: int) -> TokenRow:
    """A row whose last half is supervised."""
    return TokenRow(index, tuple(range(10, 10 + length)), tuple(place >= length // 2 for place in range(length)))


def test_schedule_rises_to_the_peak_and_falls_along_a_cosine() -> None:
    config = TrainConfig(learning_rate=1e-2, warmup_share=0.1, final_learning_rate_share=0.1)
    rates = [learning_rate(config, step, 100) for step in range(100)]
    assert rates[:3] == pytest.approx([1e-3, 2e-3, 3e-3])
    assert rates[9] == rates[10] == pytest.approx(1e-2)
    assert rates[55] == pytest.approx(1e-3 + 0.5 * 9e-3)  # half of the cosine
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 1e-3 < rates[99] < 1.01e-3


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"schedule": "constant"}, {10: 1e-2, 55: 1e-2, 99: 1e-2}),
        ({"schedule": "linear"}, {10: 1e-2, 55: 1e-3 + 0.5 * 9e-3, 99: 1e-3 + 9e-3 / 90}),
        ({"schedule": "warmup_stable_decay"}, {10: 1e-2, 80: 1e-2, 85: 1e-3 + 0.5 * 9e-3, 95: 1e-3 + 9e-3 * (1 - 0.75**0.5)}),
        ({"schedule": "warmup_stable_decay", "decay_share": 1.0}, {10: 1e-2, 55: 1e-3 + 9e-3 * (1 - 0.5**0.5)}),
    ],
)
def test_schedule_of_each_kind_passes_through_known_points(settings: dict[str, Any], expected: dict[int, float]) -> None:
    config = TrainConfig(learning_rate=1e-2, warmup_share=0.1, final_learning_rate_share=0.1, **settings)
    assert learning_rate(config, 4, 100) == pytest.approx(5e-3)
    assert {step: learning_rate(config, step, 100) for step in expected} == pytest.approx(expected)


def test_early_stop_without_heldout_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="eval_rows is 0"):
        TrainConfig(early_stop_evals=2, eval_rows=0)


def test_schedule_counts_partial_batches_and_fractions_of_an_epoch() -> None:
    assert total_steps(TrainConfig(epochs=2, batch_rows=16), 33) == 6
    assert total_steps(TrainConfig(epochs=0.5, batch_rows=16), 33) == 2
    assert total_steps(TrainConfig(epochs=2, batch_rows=16, max_steps=4), 33) == 4


def test_plan_each_epoch_holds_every_row_once_in_another_order() -> None:
    config = TrainConfig(batch_rows=4, seed=3)
    plan = BatchPlan(config, 10)
    first, second = ([index for step in steps for index in plan.rows_of_step(step)] for steps in ((0, 1, 2), (3, 4, 5)))
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert BatchPlan(config, 10).rows_of_step(4) == plan.rows_of_step(4)  # asked first or asked later


@pytest.mark.parametrize(("micro_batch_rows", "num_workers"), [(16, 1), (3, 1), (3, 2), (16, 4), (1, 16)])
def test_packs_of_all_workers_hold_every_row_and_target_once(micro_batch_rows: int, num_workers: int) -> None:
    rows = [row(index, 8 + index % 5) for index in range(11)]
    packs = [pack for rank in range(num_workers) for pack in worker_packs(rows, micro_batch_rows, rank, num_workers)]
    assert sorted(number for pack in packs for number in pack.row_numbers) == list(range(11))
    assert sum(pack.num_supervised for pack in packs) == count_supervised(rows)
    assert max(pack.num_rows for pack in packs) <= micro_batch_rows


def state(step: int) -> TrainState:
    return TrainState(step, {"master": torch.full((4,), float(step))}, {"loss": [[step, 0.5]]})


def test_checkpoint_newest_is_loaded_and_old_ones_are_removed(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        checkpoint.save(tmp_path, state(step), "f", keep=2)
    loaded = checkpoint.load_latest(tmp_path, "f")
    assert loaded is not None
    assert (loaded.step, loaded.tensors["master"].tolist(), loaded.history) == (30, [30.0] * 4, {"loss": [[30, 0.5]]})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000020", "step-00000030"]


def test_checkpoint_damaged_or_unfinished_is_passed_over(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        checkpoint.save(tmp_path, state(step), "f", keep=3)
    (tmp_path / "step-00000030" / checkpoint.STATE_NAME).unlink()
    tensors = tmp_path / "step-00000020" / checkpoint.TENSORS_NAME
    tensors.write_bytes(tensors.read_bytes()[:-4] + b"\x00\x00\x00\x01")
    (tmp_path / ".step-00000040.1.partial").mkdir()
    loaded = checkpoint.load_latest(tmp_path, "f")
    assert loaded is not None
    assert loaded.step == 10


def test_checkpoint_of_other_settings_is_not_used(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, state(10), "one run", keep=2)
    assert checkpoint.load_latest(tmp_path, "another run") is None
    assert json.loads((tmp_path / "step-00000010" / checkpoint.STATE_NAME).read_text())["fingerprint"] == "one run"
