"""`pipelines/charts.py` with the real helm."""

from __future__ import annotations

from pathlib import Path

import pytest

from infra.errors import ConfigError
from pipelines import charts

JOB = {
    "store": {"url": "s3://bucket/x"},
    "rayJob": {"enabled": True, "name": "slipway-train-0123", "job": "staging/train-0123/config.json"},
}


def test_render_of_a_job_gives_one_rayjob_of_that_name() -> None:
    """What the kubernetes executor asks for."""
    jobs = [found for found in charts.render("training", JOB, name="nightly") if found["kind"] == "RayJob"]
    (job,) = jobs
    assert job["metadata"]["name"] == "slipway-train-0123"
    assert job["spec"]["entrypoint"].split()[-1] == "training.finetune"


def test_render_with_a_misspelt_value_says_where() -> None:
    """The schema refuses what no template reads."""
    with pytest.raises(ConfigError, match=r"(?s)/rayJob.*modul\b"):
        charts.render("training", {"rayJob": {"modul": "training.finetune"}}, name="nightly")


def test_render_without_a_store_says_what_is_missing() -> None:
    """A contradiction that a schema does not see."""
    with pytest.raises(ConfigError, match=r"store\.url"):
        charts.render("training", {"rayJob": JOB["rayJob"]}, name="nightly")


def test_render_of_an_unknown_profile_names_those_there_are() -> None:
    """Rather than helm's error of a file."""
    with pytest.raises(ConfigError, match="profile 'huge'"):
        charts.render("training", {}, name="nightly", profile="huge")


def test_helm_program_where_there_is_none_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine without it can still do all else."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(charts, "TOOLS_DIR", tmp_path)
    with pytest.raises(ConfigError, match="make tools"):
        charts.helm_program()


def test_parse_manifests_reads_scalars_as_the_api_server_does() -> None:
    """A label `12:30` is text to Kubernetes, and 750 to YAML 1.1; a number with an exponent is a number to both."""
    (found,) = charts.parse_manifests(
        "{a: =, b: 12:30, c: 2001-01-01, d: 4e+07, e: 1.5, f: -12, g: 0440, h: true, i: ~, j: .5, k: '7', l: 1_0}"
    )
    texts = {"a": "=", "b": "12:30", "c": "2001-01-01", "k": "7", "l": "1_0"}
    assert found == texts | {"d": 4e7, "e": 1.5, "f": -12, "g": 0o440, "h": True, "i": None, "j": 0.5}
    assert isinstance(found["f"], int)
