"""What the charts hold that is written from elsewhere is what would be written now, and says what it must."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from infra.chart_schema import values_of
from pipelines.chart_files import MODELS, main, stale_files
from pipelines.charts import CHARTS_DIR, profile_file, profiles


def test_written_files_in_the_tree_are_what_the_models_would_write() -> None:
    """A changed model needs `make schema`."""
    assert list(stale_files()) == []


def test_file_changed_by_hand_is_named_by_the_check_and_written_again_without(tmp_path: Path) -> None:
    """One changed word is enough."""
    charts = tmp_path / "helm"
    shutil.copytree(CHARTS_DIR, charts)
    changed = charts / "training" / "values.yaml"
    right = changed.read_text()
    changed.write_text(right.replace("10001", "0"))
    said: list[str] = []
    assert main(["--check"], charts, said.append) == 1
    assert main([], charts, said.append) == 0
    assert said == ["stale: helm/training/values.yaml", "written: helm/training/values.yaml"]
    assert changed.read_text() == right


@pytest.mark.parametrize("chart", MODELS)
def test_values_file_read_back_is_the_model_by_default(chart: str) -> None:
    """The file is written line by line, so YAML must read the same from it."""
    model, _ = MODELS[chart]
    data = yaml.safe_load((CHARTS_DIR / chart / "values.yaml").read_text())
    assert model.model_validate(data) == model()
    wanted = model().model_dump(mode="json", by_alias=True, exclude_none=True)
    if chart == "serving":  # whose engine follows from the model where nobody names one
        del wanted["config"]["serve"]["engine"]
    assert data == wanted


@pytest.mark.parametrize("chart", MODELS)
def test_values_of_a_chart_each_have_a_text(chart: str) -> None:
    """A value that says nothing of itself is one nobody can set; names that Kubernetes or the field itself explains are few."""
    values = list(values_of(MODELS[chart][0]))
    silent = [value.path for value in values if not value.text and not value.path.startswith("config.")]
    assert len(values) > 50
    assert silent == []


def profile_cases() -> list[tuple[str, str]]:
    """Every profile of every chart."""
    return [(chart, profile) for chart in MODELS for profile in profiles(chart)]


@pytest.mark.parametrize(("chart", "profile"), profile_cases())
def test_profile_over_the_defaults_is_what_the_model_takes(chart: str, profile: str) -> None:
    """The model sees contradictions that the schema does not."""
    model, _ = MODELS[chart]
    data = merged(
        model().model_dump(mode="json", by_alias=True, exclude_none=True), yaml.safe_load(profile_file(chart, profile).read_text())
    )
    assert model.model_validate(data) != model()


def merged(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """As helm lays one file of values over another."""
    both = {key: merged(under[key], value) for key, value in over.items() if isinstance(value, dict) and isinstance(under.get(key), dict)}
    return {**under, **over, **both}


def test_every_chart_has_the_four_profiles() -> None:
    """The same names everywhere, for `slipway deploy --profile`."""
    assert {chart: set(profiles(chart)) for chart in MODELS} == {chart: {"laptop", "cpu", "gpu", "production"} for chart in MODELS}


@pytest.mark.parametrize("chart", MODELS)
def test_readme_of_a_chart_has_the_table_of_its_values(chart: str) -> None:
    """Without a README there is no place for the table, and nothing would be stale."""
    text = (CHARTS_DIR / chart / "README.md").read_text()
    assert all(f"| `{value.path}` |" in text for value in values_of(MODELS[chart][0]))
    assert "| `image.repository` | string | needed |" not in text
