"""What a run tells: figures, samples and their places in a real MLflow store."""

from __future__ import annotations

import json
from pathlib import Path

import fsspec
import pytest
import torch

from infra import tracking
from infra.answers import read_prompts
from infra.chat import load_codec
from infra.contracts import read_manifest
from infra.process import TrackingTarget
from training import generate
from training.config import FinetuneJob, LoraConfig, TrainConfig
from training.data.tokens import read_token_rows
from training.flops import count_operations
from training.loop import Trainer
from training.model import prepare_model
from training.packing import make_pack
from training.recorder import SAMPLES_NAME, Recorder
from training.samples import MAX_NEW_TOKENS
from training.worker import open_store, run_worker, train_to_end

CONFIG = TrainConfig(lora=LoraConfig(rank=4, alpha=8), precision="fp32", batch_rows=10, max_steps=6, eval_steps=3, log_steps=1, eval_rows=4)


@pytest.fixture(scope="module")
def recorded(toy_base: Path, toy_tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[FinetuneJob, Trainer]:
    """One short run, all of it logged."""
    place = tmp_path_factory.mktemp("recorded")
    uri = f"sqlite:///{place}/mlflow.db"
    client = tracking.client(uri)
    run_id = tracking.start_run(client, tracking.ensure_experiment(client, "toy", place / "artifacts"), "train")
    (place / "out").mkdir()
    target = TrackingTarget(uri=uri, run_id=run_id)
    job = FinetuneJob(output_dir=place / "out", base_dir=toy_base, tokens_dir=toy_tokens, train=CONFIG, tracking=target)
    trainer = Trainer(prepare_model(toy_base, CONFIG, torch.float32), CONFIG, read_token_rows(toy_tokens, "train"))
    recorder = Recorder(job, trainer)
    train_to_end(trainer, recorder, job, open_store(job, [], trainer, "fp32"))
    recorder.finish(1.0)
    return job, trainer


def test_metrics_of_every_step_reach_mlflow(recorded: tuple[FinetuneJob, Trainer]) -> None:
    job, _ = recorded
    assert job.tracking is not None
    client = tracking.client(job.tracking.uri)
    run = client.get_run(job.tracking.run_id)
    rates = {"rows_per_s", "tokens_per_s", "supervised_tokens_per_s", "mfu", "memory_bytes", "data_wait_share/worker_0"}
    assert set(run.data.metrics) == {"loss", "learning_rate", "gradient_norm", "heldout_loss", *rates}
    assert len(client.get_metric_history(job.tracking.run_id, "loss")) == 6
    assert [metric.step for metric in client.get_metric_history(job.tracking.run_id, "heldout_loss")] == [3, 6]
    assert 0 < run.data.metrics["mfu"] < 1.5  # the peak itself is measured, so noise may lift a share of it over one
    assert 0 < run.data.metrics["data_wait_share/worker_0"] < 1


def test_samples_of_each_evaluation_are_one_table(recorded: tuple[FinetuneJob, Trainer], tmp_path: Path) -> None:
    job, trainer = recorded
    assert job.tracking is not None
    client = tracking.client(job.tracking.uri)
    stored = json.loads(Path(client.download_artifacts(job.tracking.run_id, SAMPLES_NAME, str(tmp_path))).read_text())
    table = dict(zip(stored["columns"], zip(*stored["data"], strict=True), strict=True))
    assert list(table["step"]) == [3, 3, 3, 6, 6, 6]
    prompts, facts = read_prompts(job.tokens_dir)[:3], read_manifest(job.base_dir).model
    assert facts is not None
    assert list(table["expected"]) == [prompt.expected for prompt in prompts] * 2
    model = prepare_model(job.base_dir, CONFIG, torch.float32)
    for own, trained in zip(model.parameters(), trainer.model.parameters(), strict=True):
        own.data.copy_(trained.data)
    model.set_attn_implementation(generate.NAME)  # type: ignore[operator]
    again = generate.greedy_answers(model, [prompt.ids for prompt in prompts], facts.stop_ids, MAX_NEW_TOKENS)
    codec = load_codec(job.base_dir)
    assert list(table["answer"][3:]) == [codec.decode(ids) for ids, _ in again]
    assert table["answer"][:3] != table["answer"][3:]


def test_summary_holds_the_curves(recorded: tuple[FinetuneJob, Trainer]) -> None:
    summary = json.loads((recorded[0].output_dir / "train.json").read_text())
    assert [step for step, _ in summary["loss"]] == [step for step, _ in summary["learning_rate"]] == list(range(1, 7))
    assert summary["rows"] == 45 + 10
    assert summary["steps"] == 6
    assert summary["memory_bytes"] > 1 << 20


def test_operations_are_those_of_products_with_weights(toy_base: Path, toy_tokens: Path) -> None:
    """By hand for the toy: hidden 64, 4 heads and 2 key heads of 16, 128 wide, 2 layers, rank 4 on each of seven layers."""
    layers = [(64, 64), (32, 64), (32, 64), (64, 64), (128, 64), (128, 64), (64, 128)]
    frozen, adapters = 2 * sum(rows * columns for rows, columns in layers), 2 * sum(4 * (rows + columns) for rows, columns in layers)
    model = prepare_model(toy_base, CONFIG, torch.float32)
    vocabulary = model.get_output_embeddings().weight.shape[0]  # type: ignore[operator]
    pack = make_pack(read_token_rows(toy_tokens, "train")[:3])
    expected = pack.ids.numel() * (4 * frozen + 6 * adapters) + pack.num_supervised * 4 * vocabulary * 64
    assert count_operations(model).of([pack]) == expected
    full = prepare_model(toy_base, CONFIG.model_copy(update={"method": "full"}), torch.float32)
    assert count_operations(full).of([pack]) == pack.ids.numel() * 6 * frozen + pack.num_supervised * 6 * vocabulary * 64


def test_checkpoints_at_a_url_serve_a_resume_and_are_gone_once_the_run_is_done(toy_base: Path, toy_tokens: Path, tmp_path: Path) -> None:
    url = f"memory://{tmp_path}/bucket"
    train = CONFIG.model_copy(update={"checkpoint_url": url, "checkpoint_steps": 2})
    job = FinetuneJob(output_dir=tmp_path / "out", base_dir=toy_base, tokens_dir=toy_tokens, train=train)
    job.output_dir.mkdir()
    trainer = Trainer(prepare_model(toy_base, train, torch.float32), train, read_token_rows(toy_tokens, "train"))
    store = open_store(job, ["x"], trainer, "fp32")
    files = fsspec.filesystem("memory")
    trainer.train_step()
    store.save(trainer.state(Recorder(job, trainer).history))
    store.finish()
    assert len(files.glob(f"{tmp_path}/bucket/*/step-00000001/checkpoint.json")) == 1
    run_worker(job, ["x"])
    summary = json.loads((job.output_dir / "train.json").read_text())
    assert [step for step, _ in summary["loss"]] == list(range(2, 7))  # it went on after the first step
    assert files.glob(f"{tmp_path}/bucket/*/*") == []
