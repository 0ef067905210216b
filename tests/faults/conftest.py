"""The one training of this suite, and its closing line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from infra.contracts import Manifest
from infra.files import read_json, write_json_atomic
from tests.conftest import write_toy_model
from tests.faults.toy_run import Fault, make_spec, toy_run
from training import finetune
from training.config import FinetuneJob
from training.worker import run_worker

CAUGHT, FALSE_ALARMS = pytest.StashKey[list[bool]](), pytest.StashKey[list[bool]]()


def pytest_configure(config: pytest.Config) -> None:
    """Counts of the closing line."""
    config.stash[CAUGHT], config.stash[FALSE_ALARMS] = [], []


def pytest_unconfigure(config: pytest.Config) -> None:
    """The very last line: `faults: caught/all caught, false alarms: alarms/clean runs`."""
    caught, alarms = config.stash[CAUGHT], config.stash[FALSE_ALARMS]
    if caught or alarms:
        print(f"faults: {sum(caught)}/{len(caught)} caught, false alarms: {sum(alarms)}/{len(alarms)}")


@pytest.fixture(scope="session", autouse=True)
def _train_here() -> Iterator[None]:
    """Training in this process: Ray would take seconds to start for each of the runs."""

    def train(job: FinetuneJob, base: Manifest, tokens: Manifest) -> None:
        run_worker(job, [base.digest, tokens.digest])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune, "train_on_ray", train)
        threads = torch.get_num_threads()
        yield
        torch.set_num_threads(threads)


def scaled_toy(folder: Path, seed: int) -> Path:
    """A toy model whose positions are scaled, so that losing the scale changes it, and which can learn to stop."""
    write_toy_model(folder)
    shift_weights(folder, seed)
    told = read_json(folder / "config.json")
    told.pop("rope_parameters", None)
    write_json_atomic(folder / "config.json", {**told, "rope_theta": 10000.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0}})
    return folder


@pytest.fixture(scope="session")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of this suite's models, rows and runs."""
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="session")
def model(suite: Path) -> Path:
    """The toy that all runs start from."""
    return scaled_toy(suite / "model", seed=2)


@pytest.fixture(scope="session")
def foreign(suite: Path) -> Path:
    """Home of a whole run of another model on other rows."""
    other = scaled_toy(suite / "other-model", seed=1)
    home = suite / "foreign"
    verdict = toy_run(home, make_spec(suite / "foreign-rows", other, seed=99))
    assert verdict.passed, verdict.reasons
    return home


def shift_weights(folder: Path, seed: int) -> None:
    """Other random weights in the same shapes, the stop token's too: as the padding it has zeros, so no training could make it likely."""
    from safetensors.torch import load_file, save_file

    torch.manual_seed(seed)
    weights = load_file(folder / "model.safetensors")
    made = {name: (torch.randn_like(each.float()) * 0.2).to(each.dtype) if each.ndim > 1 else each for name, each in weights.items()}
    save_file(made, folder / "model.safetensors", metadata={"format": "pt"})


def fault_id(fault: Fault) -> str:
    """A fault's name in pytest's output."""
    return fault.name
