"""`python -m tests.charts.matrix`: every chart linted, rendered and judged in every way that cases.py has.

The last line is `charts: N manifests, 0 invalid`. Exit code 1 where a manifest is invalid, a rendering fails, or nothing was judged.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import yaml

from infra.errors import ConfigError
from pipelines.charts import CHARTS_DIR, helm, profile_file, render
from tests.charts.alert_tests import alert_problems
from tests.charts.cases import CASES, NAMESPACE, RELEASE, Case, Rendering, over, profiles_of, renderings
from tests.charts.crds import CRDS_VARIABLE, must_be_here
from tests.charts.expressions import expression_problems, promtool_problems
from tests.charts.judge import judge, known_kinds, needs_kuberay
from tests.charts.scan import scan_problems

KUBERAY_GROUP = "ray.io/"


@dataclass
class Outcome:
    """What came of one rendering."""

    rendering: Rendering
    documents: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0
    """That helm took."""


def given_names(values: Any) -> set[str]:
    """Names of objects that values say are there already."""
    if isinstance(values, list):
        return set().union(*map(given_names, values))
    if not isinstance(values, dict):
        return set()
    own = {str(value) for key, value in values.items() if key.startswith("existing") and isinstance(value, str)}
    return own.union(*(given_names(value) for value in values.values()))


@functools.cache
def later_documents(case_index: int, profile: str | None, kube_version: str) -> list[dict[str, Any]]:
    """What a program of the release makes later; the APIs that the cluster has beside make no difference to it."""
    case = CASES[case_index]
    return render_case(Rendering(case, profile, kube_version, case.apis), case.later) if case.later else []


def render_case(rendering: Rendering, changes: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
    """The manifests of one rendering, with changed values. Raises ConfigError where helm refuses."""
    return render(
        rendering.case.chart,
        over(rendering.case.values, changes or {}),
        name=RELEASE,
        namespace=NAMESPACE,
        kube_version=rendering.kube_version,
        api_versions=rendering.api_versions,
        profile=rendering.profile,
    )


def examine(rendering: Rendering) -> Outcome:
    """Renders and judges; a chart that does not render is a problem like any other."""
    started_s = time.monotonic()
    try:
        documents = render_case(rendering)
        seconds = time.monotonic() - started_s
        later = later_documents(CASES.index(rendering.case), rendering.profile, rendering.kube_version)
    except ConfigError as error:
        return Outcome(rendering, problems=[error.message])
    values = rendering.case.values
    profile = {} if rendering.profile is None else yaml.safe_load(profile_file(rendering.case.chart, rendering.profile).read_text())
    if not documents:
        return Outcome(rendering, problems=["nothing was rendered"])
    judged = [document for document in documents if is_judged(document)]
    found = judge(judged, rendering.kube_version, given_names(values) | given_names(profile), later)
    return Outcome(rendering, documents, found + expression_problems(documents), seconds)


def is_judged(document: dict[str, Any]) -> bool:
    """False for KubeRay's kinds where their definitions are not here."""
    return not (document["apiVersion"].startswith(KUBERAY_GROUP) and needs_kuberay([document], known_kinds()))


def has_ids(outcome: Outcome) -> bool:
    """False where the cluster gives users their ids, as OpenShift does: checkov would ask for them."""
    return bool(over({"security": {"setIds": True}}, outcome.rendering.case.values)["security"]["setIds"])


def lint(case: Case, profile: str | None) -> list[str]:
    """What `helm lint --strict` says of a chart with these values."""
    arguments = ["lint", "--strict", "--quiet", str(CHARTS_DIR / case.chart)]
    if profile is not None:
        arguments += ["--values", str(profile_file(case.chart, profile))]
    if case.apis:  # lint knows no --api-versions, and these cases are refused without them
        return []
    try:
        helm([*arguments, "--values", "-"], json.dumps(case.values))
    except ConfigError as error:
        return [f"{case.chart} {profile or 'by default'}, {case.name}: {error.message}"]
    return []


def main(arguments: Sequence[str] = ()) -> int:
    """Runs the matrix; names of charts as arguments run those alone."""
    cases = [case for case in CASES if not arguments or case.chart in arguments]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        linted = list(pool.map(lambda pair: lint(*pair), [(case, profile) for case in cases for profile in profiles_of(case)]))
        outcomes = list(pool.map(examine, renderings(cases)))
    documents = [document for outcome in outcomes for document in outcome.documents]
    problems = [line for lines in linted for line in lines] + promtool_problems(documents, print)
    problems += alert_problems(print)
    problems += scan_problems([document for outcome in outcomes if has_ids(outcome) for document in outcome.documents], print)
    invalid = sum(len({line.partition(":")[0] for line in outcome.problems}) for outcome in outcomes) + len(problems)
    told_of(outcomes, problems)
    print(f"{len(outcomes)} renderings, the slowest in {max((outcome.seconds for outcome in outcomes), default=0):.2f} s")
    left_out = sum(not is_judged(document) for document in documents)
    if left_out:
        print(f"{left_out} manifests of KubeRay's kinds are not judged: set {CRDS_VARIABLE} to a folder of their definitions")
    print(f"charts: {len(documents) - left_out} manifests, {invalid} invalid")
    return 1 if invalid or not documents or (left_out and must_be_here()) else 0


def told_of(outcomes: Iterable[Outcome], problems: Iterable[str]) -> None:
    """Prints each problem once, with the first rendering that has it and how many more have it too."""
    where: dict[str, list[Rendering]] = {}
    for outcome in outcomes:
        for line in outcome.problems:
            where.setdefault(line, []).append(outcome.rendering)
    for line, found in where.items():
        print(f"{line}\n    in {found[0]}" + (f", and {len(found) - 1} more" if len(found) > 1 else ""))
    for line in problems:
        print(line)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
