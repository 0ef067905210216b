"""Each seeded fault is caught before promotion and named; clean runs raise no alarm. `make faults` runs them and counts."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tests.faults import data_faults, model_faults
from tests.faults.conftest import CAUGHT, FALSE_ALARMS, fault_id
from tests.faults.toy_run import Fault, make_spec, toy_run

pytestmark = pytest.mark.faults
NUM_CLEAN_RUNS = 20


@pytest.mark.parametrize("fault", [*data_faults.FAULTS, *model_faults.FAULTS], ids=fault_id)
def test_fault_is_caught_before_promotion_and_named(
    fault: Fault, suite: Path, model: Path, foreign: Path, request: pytest.FixtureRequest
) -> None:
    verdict = toy_run(suite / "home", make_spec(suite / "rows", model, seed=0, asks_live=fault.asks_live), fault, foreign)
    caught = not verdict.passed and re.search(fault.named, verdict.reasons, re.DOTALL) is not None
    request.config.stash[CAUGHT].append(caught)
    assert not verdict.passed, "the run would be promoted"
    assert caught, verdict.reasons


@pytest.mark.parametrize("seed", range(NUM_CLEAN_RUNS))
def test_clean_run_raises_no_alarm(seed: int, suite: Path, model: Path, request: pytest.FixtureRequest) -> None:
    home = suite / f"clean-{seed}"
    verdict = toy_run(home, make_spec(suite / f"clean-rows-{seed}", model, seed, asks_live=seed == 0))
    request.config.stash[FALSE_ALARMS].append(not verdict.passed)
    assert verdict.passed, verdict.reasons
    shutil.rmtree(home)
