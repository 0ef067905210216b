"""The commands that the charts' pods run are ones that our programs take."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from infra.kube import OUR_VARIABLES
from pipelines.charts import CHARTS_DIR, render
from tests.charts.objects import only
from tests.charts.test_training_chart import PIPELINE, job_values

VARIABLE = re.compile(r"^ *- name: ([A-Z][A-Za-z_]+)$", re.MULTILINE)


def test_entrypoint_of_a_rayjob_is_a_command_that_the_program_takes(tmp_path: Path) -> None:
    """Run for real, on an empty store: what it misses is the order, and nothing else."""
    values = job_values(store={"url": f"file://{tmp_path}/store", "existingClaim": "shared"})
    python, *arguments = shlex.split(only(render("training", values, name="nightly"), "RayJob")["spec"]["entrypoint"])
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "SLIPWAY_HOME": str(tmp_path / "home")},
        check=False,
    )
    assert python == "/opt/venv/bin/python"
    assert done.returncode == 2, done.stderr
    assert "staging/train-0123/config.json: an order for training.finetune is needed" in done.stderr


def test_arguments_of_the_driver_are_options_that_slipway_run_has() -> None:
    """All of them: one that it lacks would end every run by exit code 2."""
    (container,) = only(render("training", PIPELINE, name="nightly"), "Job")["spec"]["template"]["spec"]["containers"]
    command, _spec, *options = container["args"]
    shown = subprocess.run(
        [sys.executable, "-m", "pipelines.cli", command, "--help"],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "COLUMNS": "200", "NO_COLOR": "1"},
        check=True,
    )
    assert "--executor=kubernetes" in options
    assert [option for option in options if f"{option.partition('=')[0]} " not in shown.stdout] == []


def test_variables_that_the_templates_set_are_all_refused_in_the_values() -> None:
    """A container may have each once, so one of ours in `env` would be an error of the cluster's."""
    named = {name for file in CHARTS_DIR.rglob("*") if file.suffix in (".tpl", ".yaml") for name in VARIABLE.findall(file.read_text())}
    assert named == set(OUR_VARIABLES)
