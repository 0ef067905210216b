"""One run of the whole job on a toy model, made once and shared by all tests that ask for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

COLOURS = ["red", "green", "blue", "white"]


def slipway(home: Path, *arguments: str, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, with everything it keeps below `home`."""
    environment = {**os.environ, "SLIPWAY_HOME": str(home)}
    command = [sys.executable, "-m", "pipelines.cli", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False, **kwargs)


def chat_row(number: int) -> dict[str, Any]:
    """One row of the toy's dataset."""
    colour = COLOURS[number % len(COLOURS)]
    return {
        "messages": [
            {"role": "user", "content": f"lamp {number} {colour}"},
            {"role": "assistant", "content": json.dumps({"name": "set", "arguments": {"colour": colour}})},
        ]
    }


def write_toy_spec(folder: Path, model: Path, **parts: Any) -> Path:
    """A spec file for a toy model and its rows beside it; `parts` are what it says beyond that."""
    for name, numbers in (("train", range(0, 96)), ("heldout", range(100, 108))):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(chat_row(number)) + "\n" for number in numbers))
    spec = {
        "name": "toy",
        "base_model": f"file:{model}",
        "dataset": {"type": "files", "train": "train.jsonl", "heldout": "heldout.jsonl"},
        "train": {"epochs": 1, "batch_rows": 8, "micro_batch_rows": 8, "lora": {"rank": 4}},
        # The toy's logits are steep: what 8 bits in the cache change at the server is several times what a real model shows.
        "prove": {"heldout_prompts": 4, "max_new_tokens": 8, "tolerance": 4},
        # An untrained toy knows nothing: what is tested here is the way through, not the score.
        "gates": {"min_score": 0, "min_gain": -1, "max_quantization_drop": 1, "min_merge_agreement": 0},
        **parts,
    }
    path = folder / "toy.yaml"
    path.write_text(yaml.safe_dump(spec))
    return path


@pytest.fixture(scope="session")
def toy_spec(tmp_path_factory: pytest.TempPathFactory, toy_model: Path, free_port: int) -> Path:
    """The spec file of the shared run."""
    return write_toy_spec(
        tmp_path_factory.mktemp("pipeline"),
        toy_model,
        quantize={"formats": ["openvino-int8", "openvino-int4-awq"], "calibration_rows": 8},
        evaluate={"metrics": ["exact_match_json", "valid_json", "perplexity"], "max_new_tokens": 8},
        serve={"port": free_port},
    )


@pytest.fixture(scope="session")
def home(toy_spec: Path) -> Path:
    """Where the shared run keeps what it makes."""
    return toy_spec.parent / "home"


@pytest.fixture(scope="session")
def report(toy_spec: Path, home: Path) -> dict[str, Any]:
    """The report of the shared run."""
    done = slipway(home, "run", str(toy_spec), "--json")
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr.lower()
    return dict(json.loads(done.stdout))
