"""What is shown to checkov, and who may hold a token of the cluster."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.charts.scan import CONFIG, PROGRAM, scan_problems, shown, token_problems


@pytest.fixture
def yard() -> list[dict[str, Any]]:
    """The good release; its pods say nothing of tokens."""
    return list(json.loads(json.dumps(yaml.safe_load(Path(__file__).with_name("yard.yaml").read_text()))))


def test_shown_pods_of_ray_are_pods_and_those_of_a_job_end(yard: list[dict[str, Any]]) -> None:
    kinds = {document["kind"]: [each["kind"] for each in shown(document)] for document in yard}
    assert kinds["RayService"] == ["Pod", "Pod"]
    assert kinds["RayJob"] == ["Job"]
    assert kinds["Deployment"] == ["Deployment"]


def test_token_that_no_program_needs_is_named(yard: list[dict[str, Any]]) -> None:
    crane = next(document for document in yard if document["kind"] == "Deployment")
    spec = crane["spec"]["template"]["spec"]
    assert token_problems(crane) == ["Deployment/yard-crane: automountServiceAccountToken is not false"]
    spec["automountServiceAccountToken"] = False
    assert token_problems(crane) == []
    del spec["automountServiceAccountToken"]
    spec["containers"][0]["name"] = "driver"
    assert token_problems(crane) == []


def test_every_check_that_is_left_out_has_a_reason() -> None:
    lines = [line.strip() for line in CONFIG.read_text().splitlines()]
    left_out = [index for index, line in enumerate(lines) if line.startswith("- CKV")]
    assert len(left_out) == len(yaml.safe_load(CONFIG.read_text())["skip-check"]) > 0
    assert all(lines[index - 1].startswith("# ") for index in left_out)


@pytest.mark.slow
@pytest.mark.skipif(not PROGRAM.is_file(), reason="checkov is not here: `make charts` installs it")
def test_scan_names_what_checkov_refuses(yard: list[dict[str, Any]]) -> None:
    crane = next(document for document in yard if document["kind"] == "Deployment")
    crane["spec"]["template"]["spec"]["automountServiceAccountToken"] = False
    crane["spec"]["template"]["spec"]["containers"][0]["securityContext"]["privileged"] = True
    assert any("CKV_K8S_16" in line for line in scan_problems([crane], print))


def test_scan_without_checkov_says_so(yard: list[dict[str, Any]], tmp_path: Path) -> None:
    said: list[str] = []
    scan_problems(yard, said.append, program=tmp_path / "checkov")
    assert said == ["checkov is not here: `make charts` scans with it"]
