"""Training on a real Ray cluster whose nodes share no folder but the artifact store; one of them is lost on the way."""

from __future__ import annotations

import json
import shutil
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import SecretStr
from safetensors.torch import load_file, save_file

from infra.artifact_store import open_store
from infra.contracts import read_manifest, verify
from infra.errors import ConfigError, TransientError
from pipelines.executors.ray_job import RayExecutor
from pipelines.executors.ray_jobs_api import RayJobs
from tests.integration.test_training_ray import SETTINGS, uninterrupted
from tests.ray_nodes import TOKEN, Node, RayNodes, ray_nodes
from training.adapter import ADAPTER_NAME
from training.base import prepare_base
from training.config import BaseJob, FinetuneJob, RenderJob, TrainConfig
from training.data.render import render

STEPS = 300
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayNodes]:
    with ray_nodes(tmp_path_factory.mktemp("nodes"), (1, 1)) as cluster:
        yield cluster


def job(home: Path, base: Path, tokens: Path, train: TrainConfig, slot: str) -> FinetuneJob:
    """A job of a driver whose home has the two artifacts."""
    artifacts = {name: home / "artifacts" / f"{name}-{slot}" for name in ("base", "render")}  # of each test: nodes keep what they fetched
    for place, folder in zip(artifacts.values(), (base, tokens), strict=True):
        place.parent.mkdir(parents=True, exist_ok=True)
        if not place.exists():
            place.symlink_to(folder)
    staging = home / "staging" / slot
    return FinetuneJob(
        output_dir=staging / "output", progress_file=staging / "progress.jsonl", base_dir=artifacts["base"],
        tokens_dir=artifacts["render"], train=train,
    )  # fmt: skip


def spoilt(toy_model: Path, toy_tokens: Path, folder: Path) -> tuple[Path, Path]:
    """A base whose loss is not finite, and tokens for it."""
    shutil.copytree(toy_model, folder / "model")
    weights = load_file(toy_model / "model.safetensors")
    weights["model.norm.weight"][0] = float("inf")
    save_file(weights, folder / "model/model.safetensors", metadata={"format": "pt"})
    prepare_base(BaseJob(output_dir=folder / "base", source=f"file:{folder / 'model'}"))
    render(RenderJob(output_dir=folder / "tokens", base_dir=folder / "base", rows_dir=toy_tokens.parent / "rows"))
    return folder / "base", folder / "tokens"


def steps_done(job: FinetuneJob) -> int:
    if job.progress_file is None or not job.progress_file.exists():
        return 0
    return int(json.loads(job.progress_file.read_text().splitlines()[-1])["done"])


def rank_0(nodes: RayNodes, slot: str) -> Node:
    """The node on which the first worker writes."""
    (found,) = [node for node in nodes.nodes[1:] if (node.home / "staging" / slot / "progress.jsonl").exists()]
    return found


def test_workers_of_other_nodes_make_the_adapter_of_one_and_go_on_when_the_first_s_node_is_lost(
    toy_base: Path, toy_tokens: Path, tmp_path: Path, nodes: RayNodes
) -> None:
    settings = SETTINGS.model_copy(
        update={
            "epochs": 1000.0, "max_steps": STEPS, "checkpoint_steps": 20, "eval_steps": STEPS, "log_steps": 1, "max_failures": 2,
            "learning_rate": 1e-3,
        }
    )  # fmt: skip
    alone = job(tmp_path / "alone", toy_base, toy_tokens, settings, "train-1")
    alone.output_dir.parent.mkdir(parents=True)
    uninterrupted(alone)
    ours = job(tmp_path / "home", toy_base, toy_tokens, settings.model_copy(update={"num_workers": (1, 2)}), "train-2")
    store = open_store((tmp_path / "store").as_uri())
    executor = RayExecutor(RayJobs(nodes.jobs_address, SecretStr(TOKEN)), store, tmp_path / "home")
    lost: list[int] = []

    def lose() -> None:
        if not lost and steps_done(ours) >= 60:
            lost.append(steps_done(ours))
            rank_0(nodes, "train-2").kill()

    executor.run_to_end("training.finetune", ours, ours.output_dir.parent / "config.json", tmp_path / "train.log", lose)
    assert not (ours.output_dir / ADAPTER_NAME).exists()  # weights stay in the store until somebody wants them
    store.fetch_to("train-2", ours.output_dir)
    made = verify(ours.output_dir, ("adapter",))
    assert made.parents == {"base": read_manifest(toy_base).digest, "tokens": read_manifest(toy_tokens).digest}
    found, expected = (json.loads((each.output_dir / "train.json").read_text()) for each in (ours, alone))
    (first, before), (resumed_at, after) = found["workers"]
    assert (first, before, after) == (0, 2, 1)
    assert 20 <= resumed_at < STEPS
    assert resumed_at % 20 == 0
    for (step, loss), (same_step, same_loss) in zip(found["loss"], expected["loss"], strict=True):
        assert (step, loss) == (same_step, pytest.approx(same_loss, abs=1e-4))  # the sums of two workers round in another order
    tensors, same = load_file(ours.output_dir / ADAPTER_NAME), load_file(alone.output_dir / ADAPTER_NAME)
    assert max(float((tensors[name] - same[name]).abs().max()) for name in same) < 1e-3
    assert store.place.names("staging/train-2/checkpoints") == []
    assert store.manifest("train-2") == made


def test_known_error_of_a_worker_elsewhere_is_the_driver_s(toy_model: Path, toy_tokens: Path, tmp_path: Path, nodes: RayNodes) -> None:
    base, tokens = spoilt(toy_model, toy_tokens, tmp_path)
    ours = job(tmp_path / "home", base, tokens, SETTINGS, "train-3")
    executor = RayExecutor(RayJobs(nodes.jobs_address, SecretStr(TOKEN)), open_store((tmp_path / "store").as_uri()), tmp_path / "home")
    with pytest.raises(ConfigError, match=r"step 1: the loss is nan in a batch with the rows"):
        executor.run_to_end("training.finetune", ours, ours.output_dir.parent / "config.json", tmp_path / "train.log", lambda: None)


def test_training_stopped_on_the_cluster_goes_on_from_where_it_was(
    toy_base: Path, toy_tokens: Path, tmp_path: Path, nodes: RayNodes
) -> None:
    settings = SETTINGS.model_copy(update={"epochs": 1000.0, "max_steps": STEPS, "checkpoint_steps": 1000, "eval_steps": STEPS})
    ours = job(tmp_path / "home", toy_base, toy_tokens, settings, "train-4")
    executor = RayExecutor(RayJobs(nodes.jobs_address, SecretStr(TOKEN)), open_store((tmp_path / "store").as_uri()), tmp_path / "home")
    stopped: list[int] = []
    resumed: list[int] = []

    def stop() -> None:
        if not stopped and steps_done(ours) >= 20:
            stopped.append(steps_done(ours))
            headers = {"Authorization": f"Bearer {TOKEN}"}
            request = urllib.request.Request(f"{nodes.jobs_address}/api/jobs/slipway-train-4/stop", b"", headers, method="POST")
            urllib.request.urlopen(request, timeout=30).close()

    def first_step() -> None:
        if not resumed and steps_done(ours) and steps_done(ours) != before:
            resumed.append(steps_done(ours))

    where = (ours.output_dir.parent / "config.json", tmp_path / "train.log")
    with pytest.raises(TransientError, match=r"stopped after step \d+ of 300 with a checkpoint|was stopped there"):
        executor.run_to_end("training.finetune", ours, *where, stop)
    before = steps_done(ours)
    executor.run_to_end("training.finetune", ours, *where, first_step)
    assert resumed[0] > stopped[0]
    assert json.loads((ours.output_dir / "train.json").read_text())["steps"] == STEPS
