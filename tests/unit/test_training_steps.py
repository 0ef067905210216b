"""Steps, batches and checkpoints are pure functions of their inputs, and the update is AdamW's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from safetensors.torch import load_file

from infra.errors import TransientError
from training.adapter import ADAPTER_NAME
from training.batches import BatchPlan, count_supervised, worker_packs
from training.checkpoint import STATE_NAME, CheckpointStore, TrainState
from training.config import FinetuneJob, LoraConfig, TrainConfig
from training.data.tokens import TokenRow
from training.elsewhere import STOP_NAME
from training.folders import checkpoints_folder
from training.layout import Layout
from training.parameters import TrainableParameters
from training.recorder import SUMMARY_NAME
from training.schedule import learning_rate, total_steps
from training.worker import run_worker


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


def store(place: str | Path, fingerprint: str = "f", keep: int = 2) -> CheckpointStore:
    return CheckpointStore(str(place), fingerprint, keep, Layout(), TrainableParameters(torch.nn.Linear(3, 2)))


def state(step: int) -> TrainState:
    flat = {name: torch.full((8,), float(step + place)) for place, name in enumerate(("master", "optimizer.0.exp_avg"))}
    return TrainState(step, flat, {"optimizer.0.absmax": torch.tensor([step], dtype=torch.uint8)}, {"history": {"loss": [[step, 0.5]]}})


def saved(place: str | Path, *steps: int, best_step: int | None = None, **options: Any) -> None:
    writer = store(place, **options)
    for step in steps:
        written = state(step)
        written.best_step = best_step
        writer.save(written)
        written.flat["master"].zero_()  # training goes on while the checkpoint is written
    writer.finish()


def step_found(place: str | Path, **options: Any) -> int | None:
    loaded = store(place, **options).load_latest()
    return loaded.step if loaded else None


def steps_kept(place: Path) -> list[int]:
    return sorted(int(path.parent.name.removeprefix("step-")) for path in place.glob(f"step-*/{STATE_NAME}"))


@pytest.mark.parametrize("scheme", ["", "file://", "memory://", "s3://"])
def test_checkpoint_newest_is_loaded_and_old_ones_are_removed(tmp_path: Path, scheme: str, request: pytest.FixtureRequest) -> None:
    place = f"{request.getfixturevalue('bucket') if scheme == 's3://' else scheme}{tmp_path}/checkpoints"
    saved(place, 10, 20, 30)
    loaded = store(place).load_latest()
    assert loaded is not None
    assert loaded.step == 30
    assert {name: tensor.tolist() for name, tensor in loaded.flat.items()} == {"master": [30.0] * 8, "optimizer.0.exp_avg": [31.0] * 8}
    assert loaded.opaque["optimizer.0.absmax"].tolist() == [30]
    assert loaded.opaque["optimizer.0.absmax"].dtype == torch.uint8
    assert loaded.facts["history"] == {"loss": [[30, 0.5]]}
    files, root = fsspec.url_to_fs(place)
    assert sorted(Path(path).name for path in files.ls(root, detail=False)) == ["step-00000020", "step-00000030"]


def test_checkpoint_damaged_or_unfinished_is_passed_over(tmp_path: Path) -> None:
    saved(tmp_path, 10, 20, 30, keep=3)
    (tmp_path / "step-00000030" / STATE_NAME).unlink()
    (tensors,) = (tmp_path / "step-00000020").glob("*.safetensors")
    tensors.write_bytes(tensors.read_bytes()[:-4] + b"\x00\x00\x00\x01")
    assert step_found(tmp_path, keep=3) == 10
    (tmp_path / "step-00000010" / STATE_NAME).write_text("{")
    assert step_found(tmp_path, keep=3) is None
    saved(tmp_path, 30, keep=3)  # over what the unfinished one left
    assert step_found(tmp_path, keep=3) == 30


def test_checkpoint_of_the_best_step_stays_beside_the_newest_until_another_is_best(tmp_path: Path) -> None:
    saved(tmp_path, 10, 20)
    saved(tmp_path, 30, 40, 50, best_step=20)
    assert steps_kept(tmp_path) == [20, 40, 50]
    for step in (40, 50):
        (tmp_path / f"step-000000{step}" / STATE_NAME).write_text("{")
    assert step_found(tmp_path) == 20  # as whole as any other
    saved(tmp_path, 40, 50, 60, best_step=60)
    assert steps_kept(tmp_path) == [50, 60]


def test_checkpoint_damaged_and_newer_does_not_take_the_place_of_a_whole_one(tmp_path: Path) -> None:
    saved(tmp_path, 10, 20, 30, keep=3)
    for step in (20, 30):
        (tmp_path / f"step-000000{step}" / STATE_NAME).write_text("{")
    saved(tmp_path, 15, keep=1)
    assert steps_kept(tmp_path) == [15]
    assert step_found(tmp_path) == 15


def test_run_cut_off_after_every_step_keeps_the_best_checkpoint_and_ends_alike(toy_base: Path, toy_tokens: Path, tmp_path: Path) -> None:
    """SGD at this rate has its lowest held-out loss after three of twelve steps."""
    train = TrainConfig(
        precision="fp32", lora=LoraConfig(rank=4), batch_rows=15, epochs=4, learning_rate=0.9, optimizer="sgd", schedule="constant",
        eval_steps=1, keep_best=True, checkpoint_steps=1000, cpus_per_worker=1,
    )  # fmt: skip
    whole, cut = (
        FinetuneJob(output_dir=tmp_path / name, base_dir=toy_base, tokens_dir=toy_tokens, train=train) for name in ("whole", "cut")
    )
    for job in (whole, cut):
        job.output_dir.mkdir()
    run_worker(whole, [])
    losses = [loss for _, loss in json.loads((whole.output_dir / SUMMARY_NAME).read_text())["heldout_loss"]]
    best_step = 1 + losses.index(min(losses))
    lowest_so_far = [step for step, loss in enumerate(losses, start=1) if loss == min(losses[:step])]
    assert steps_kept(checkpoints_folder(whole.output_dir)) == lowest_so_far[-2:]  # no other step was due
    checkpoints = checkpoints_folder(cut.output_dir)
    checkpoints.mkdir()
    (checkpoints / STOP_NAME).touch()  # there from the beginning: every start makes one step
    for step in range(1, len(losses)):
        with pytest.raises(TransientError, match=f"stopped after step {step} of {len(losses)}"):
            run_worker(cut, [])
    run_worker(cut, [])
    assert best_step < len(losses) - 2  # else it would be there as one of the newest
    assert steps_kept(checkpoints) == [best_step, len(losses) - 2, len(losses) - 1]
    found, expected = (load_file(job.output_dir / ADAPTER_NAME) for job in (cut, whole))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_checkpoint_of_other_settings_is_not_used(tmp_path: Path) -> None:
    saved(tmp_path, 10, fingerprint="one run")
    assert step_found(tmp_path, fingerprint="another run") is None
    assert step_found(tmp_path, fingerprint="one run") == 10


def test_checkpoint_files_hold_no_pickle(tmp_path: Path) -> None:
    saved(tmp_path, 10)
    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} == {".safetensors", ".json"}


def test_checkpoint_that_cannot_be_written_is_an_error_at_the_next_one(tmp_path: Path) -> None:
    writer = store(tmp_path / "checkpoints")
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    writer.save(state(10))
    with pytest.raises(TransientError, match=r"step-00000010 could not be written, by worker: \{0: .*Not a directory"):
        writer.finish()
