"""What `--version` says: of the command, and of a program of a stack, which is what runs in a pod."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]


@pytest.mark.parametrize(("module", "name"), [("pipelines.cli", "slipway"), ("serving.predict", PROJECT["name"])])
def test_version_of_a_program_is_the_projects(module: str, name: str) -> None:
    done = subprocess.run([sys.executable, "-m", module, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [name, PROJECT["version"]]
