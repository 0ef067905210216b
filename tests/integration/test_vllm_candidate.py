"""A run whose candidate vLLM serves: scored, timed, proven, promoted and asked under a Python of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from infra import network
from infra.contracts import read_manifest
from tests.conftest import write_toy_model
from tests.integration.conftest import slipway, write_toy_spec

pytestmark = pytest.mark.vllm


def test_run_with_vllm_as_the_engine_is_proven_promoted_and_answers(tmp_path: Path) -> None:
    write_toy_model(tmp_path / "model", hidden_size=128)  # heads of 32 numbers, the fewest that vLLM computes on a CPU
    spec = write_toy_spec(
        tmp_path,
        tmp_path / "model",
        quantize={"formats": ["vllm-bf16"]},
        evaluate={"metrics": ["exact_match_json", "perplexity"], "max_new_tokens": 8},
        serve={"port": network.free_port(), "cache_gb": 0.1},
    )
    done = slipway(tmp_path / "home", "run", str(spec), "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    checks = {(check["stage"], check["name"]): check["passed"] for check in report["parity"]["checks"]}
    assert checks[("vllm-bf16 live", "log-probabilities")]
    (made,) = (tmp_path / "home" / "artifacts").glob("quantize-vllm-bf16-*")
    manifest = read_manifest(made)
    assert manifest.model is not None
    assert manifest.model.weights is not None
    assert (manifest.weight_format, manifest.model.weights.mode) == ("vllm-bf16", "bf16")
