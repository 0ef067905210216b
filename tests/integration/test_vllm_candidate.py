"""A run whose candidate vLLM serves: scored, timed, proven, promoted and asked under a Python of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from infra import network
from infra.contracts import read_manifest
from tests.conftest import write_toy_model
from tests.integration.conftest import chat_row, slipway

pytestmark = pytest.mark.vllm


def test_run_with_vllm_as_the_engine_is_proven_promoted_and_answers(tmp_path: Path) -> None:
    write_toy_model(tmp_path / "model", hidden_size=128)  # heads of 32 numbers, the fewest that vLLM computes on a CPU
    for name, numbers in (("train", range(0, 96)), ("heldout", range(100, 108))):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(chat_row(number)) + "\n" for number in numbers))
    spec = {
        "name": "toy",
        "base_model": f"file:{tmp_path}/model",
        "dataset": {"type": "files", "train": "train.jsonl", "heldout": "heldout.jsonl"},
        "train": {"epochs": 1, "batch_rows": 8, "micro_batch_rows": 8, "lora": {"rank": 4}},
        "quantize": {"formats": ["vllm-bf16"]},
        "evaluate": {"metrics": ["exact_match_json", "perplexity"], "max_new_tokens": 8},
        "prove": {"heldout_prompts": 4, "max_new_tokens": 8, "tolerance": 4},
        "gates": {"min_score": 0, "min_gain": -1, "max_quantization_drop": 1, "min_merge_agreement": 0},
        "serve": {"port": network.free_port(), "cache_gb": 0.1},
    }
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(spec))
    done = slipway(tmp_path / "home", "run", str(tmp_path / "toy.yaml"), "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    checks = {(check["stage"], check["name"]): check["passed"] for check in report["parity"]["checks"]}
    assert checks[("vllm-bf16 live", "log-probabilities")]
    (made,) = (tmp_path / "home" / "artifacts").glob("quantize-vllm-bf16-*")
    manifest = read_manifest(made)
    assert manifest.model is not None
    assert manifest.model.weights is not None
    assert (manifest.weight_format, manifest.model.weights.mode) == ("vllm-bf16", "bf16")
