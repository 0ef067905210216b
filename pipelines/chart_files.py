"""`python -m pipelines.chart_files [--check]`: writes what the charts hold that follows from elsewhere.

- `values.yaml`, `values.schema.json` and the table in README.md, from the pydantic model of the chart's values;
- `templates/_slipway.tpl`, from helm/shared: three charts share these templates, and a chart must hold all that it needs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from pydantic import BaseModel

from infra.chart_schema import schema_text, values_table, values_text
from infra.marked_text import placed
from infra.tracking_chart import Values as TrackingValues
from pipelines.charts import CHARTS_DIR
from pipelines.training_chart import Values as TrainingValues
from serving.chart import Values as ServingValues

MODELS: dict[str, tuple[type[BaseModel], str]] = {
    "serving": (ServingValues, "serving/chart.py"),
    "tracking": (TrackingValues, "infra/tracking_chart.py"),
    "training": (TrainingValues, "pipelines/training_chart.py"),
}
"""Of each chart: the model of its values, and where that is."""
TABLE_BEGINS, TABLE_ENDS = "<!-- values: written by make schema -->\n", "<!-- end of values -->"
INTRO = """Values of Slipway's chart {chart}, written by `make schema` from {source}: change them there.
Kubernetes' words are in camelCase; `config` is the Python model verbatim."""


def wanted_files(charts_dir: Path = CHARTS_DIR) -> dict[Path, str]:
    """Each file that is written, with what it should hold."""
    shared = (charts_dir / "shared" / "_slipway.tpl").read_text(encoding="utf-8")
    files = {}
    for chart, (model, source) in MODELS.items():
        folder = charts_dir / chart
        files[folder / "values.yaml"] = values_text(model, INTRO.format(chart=chart, source=source))
        files[folder / "values.schema.json"] = schema_text(model)
        files[folder / "templates" / "_slipway.tpl"] = shared
        readme = folder / "README.md"
        if readme.is_file():
            files[readme] = placed(readme.read_text(encoding="utf-8"), TABLE_BEGINS, TABLE_ENDS, values_table(model), "the table of values")
    return files


def stale_files(charts_dir: Path = CHARTS_DIR) -> dict[Path, str]:
    """Files that do not hold what they should, with that."""
    wanted = wanted_files(charts_dir)
    return {path: text for path, text in wanted.items() if not path.is_file() or path.read_text(encoding="utf-8") != text}


def main(arguments: list[str], charts_dir: Path = CHARTS_DIR, say: Callable[[str], object] = print) -> int:
    """Writes the files, or with `--check` only tells which are stale; 1 where any is."""
    is_check = "--check" in arguments
    stale = stale_files(charts_dir)
    for path, text in stale.items():
        if not is_check:
            path.write_text(text, encoding="utf-8")
        say(f"{'stale' if is_check else 'written'}: {path.relative_to(charts_dir.parent)}")
    return 1 if stale and is_check else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
