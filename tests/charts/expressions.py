"""Expressions of alerts and of dashboards: read by a parser of PromQL, and rules by promtool too where it is."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import promql_parser
import yaml

from pipelines.charts import TOOLS_DIR
from tests.charts.pods import Document, told

# Grafana's own variables become values of the kind that stands there.
DURATION_VARIABLE = re.compile(r"\$\{?__(rate_)?(interval|range)\}?")
VARIABLE = re.compile(r"\$\{?\w+(:\w+)?\}?")


def expressions(document: Document) -> Iterator[tuple[str, str]]:
    """Each expression in an object, with where it is."""
    if document["kind"] == "PrometheusRule":
        for group in document["spec"].get("groups", ()):
            for rule in group.get("rules", ()):
                yield f"{group['name']}/{rule.get('alert') or rule.get('record')}", str(rule["expr"])
    if document["kind"] == "ConfigMap":
        for name, text in document.get("data", {}).items():
            if name.endswith(".json") and '"panels"' in text:
                for title, expression in _panels(json.loads(text)):
                    yield f"{name}/{title}", VARIABLE.sub("x", DURATION_VARIABLE.sub("5m", expression))


def expression_problems(documents: Iterable[Document]) -> list[str]:
    """Expressions that do not parse, and rules without a text for whom they wake."""
    found = [f"{told(document)}: {line}" for document in documents for line in _unparsed(document)]
    return found + [f"{told(document)}: {line}" for document in documents for line in _untold(document)]


def metric_names(expression: str) -> set[str]:
    """Names of the metrics that an expression reads."""
    names: set[str] = set()

    def read(node: Any) -> bool:
        if isinstance(node, promql_parser.VectorSelector) and node.name:
            names.add(str(node.name))
        return True

    promql_parser.walk(promql_parser.parse(expression), read)
    return names


def promtool() -> Path | None:
    """The program, in PATH or where `make charts` puts it."""
    found = shutil.which("promtool") or shutil.which("promtool", path=str(TOOLS_DIR))
    return Path(found) if found else None


def promtool_problems(documents: Iterable[Document], say: Callable[[str], object]) -> list[str]:
    """What `promtool check rules` says of the rules, each distinct object once; says so where it is not here."""
    rules = {json.dumps(document["spec"]): document for document in documents if document["kind"] == "PrometheusRule"}
    program = promtool()
    if program is None:
        if rules:
            say(f"promtool is not here: {len(rules)} PrometheusRules are only parsed (Debian's package prometheus has it)")
        return []
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for index, document in enumerate(rules.values()):
            files.append(Path(folder) / f"{index}.yaml")
            files[-1].write_text(yaml.safe_dump(document["spec"]))
        done = subprocess.run([program, "check", "rules", *files], capture_output=True, text=True, timeout=60, check=False)
    return [done.stderr.strip()] if rules and done.returncode else []


def _unparsed(document: Document) -> Iterator[str]:
    for where, expression in expressions(document):
        try:
            promql_parser.parse(expression)
        except ValueError as error:
            yield f"{where}: {error}: {expression}"


def _untold(document: Document) -> Iterator[str]:
    if document["kind"] != "PrometheusRule":
        return
    for group in document["spec"].get("groups", ()):
        for rule in group.get("rules", ()):
            if bool(rule.get("alert")) == bool(rule.get("record")):
                yield f"{group['name']}: a rule is an alert or a record, one of them"
            if rule.get("alert") and not (rule.get("labels", {}).get("severity") and rule.get("annotations", {}).get("summary")):
                yield f"{group['name']}/{rule['alert']}: an alert needs a severity and a summary"


def _panels(dashboard: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for panel in dashboard.get("panels", ()):
        yield from _panels(panel)
        yield from ((panel.get("title", ""), target["expr"]) for target in panel.get("targets", ()) if target.get("expr"))
