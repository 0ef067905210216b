"""The charts as users install them: every optional part is right, misuse is refused with its path, and size is no matter of workers."""

from __future__ import annotations

import functools
import json
import re
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from infra.errors import ConfigError
from infra.kube import Toleration
from pipelines.charts import CHARTS_DIR, Chart, render
from tests.charts import matrix
from tests.charts.cases import APIS, CASES, JOB, KUBE_VERSIONS, SERVED, STORE, UNSIGNED, Case, Rendering, over, profiles_of
from tests.charts.drawn import leaves, put
from tests.charts.matrix import examine
from tests.charts.pods import pod_templates, told

CHARTS: tuple[Chart, ...] = ("serving", "tracking", "training")
MAX_BYTES = 100_000
"""Far below the 1.5 MB of etcd: `slipway deploy` keeps all of a release in one object too."""


@functools.cache
def checker(chart: Chart) -> jsonschema.Draft202012Validator:
    """By the schema that Helm reads."""
    return jsonschema.Draft202012Validator(json.loads((CHARTS_DIR / chart / "values.schema.json").read_text()))


def refusals(chart: Chart, values: dict[str, Any]) -> list[tuple[tuple[Any, ...], str]]:
    """Path and text of each refusal."""
    return [(tuple(error.absolute_path), error.message) for error in checker(chart).iter_errors(values)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.chart}, {case.name}")
def test_chart_with_each_optional_part_is_valid(kuberay: None, case: Case) -> None:
    outcome = examine(Rendering(case, profiles_of(case)[0], KUBE_VERSIONS[-1], APIS[-1]))
    assert outcome.problems == []
    assert outcome.documents


@pytest.mark.parametrize("workers", [1, 8, 512])
def test_release_of_any_number_of_workers_has_small_objects(workers: int) -> None:
    train = render("training", {"store": STORE, "rayJob": {**JOB, "numWorkers": workers}}, name="n")
    group = {"minReplicas": workers, "maxReplicas": workers, "resources": {"limits": {"cpu": 8, "memory": "16Gi"}}}
    replicas = {"config": {"serve": {"num_replicas": workers, "cpus_per_replica": 8}}, "workerGroups": {"cpu": group}}
    serve = render("serving", over(SERVED, UNSIGNED, replicas), name="n")
    sizes = {told(document): len(json.dumps(document)) for document in [*train, *serve]}
    assert {"RayJob/" + JOB["name"], "RayService/n-model"} <= set(sizes)
    assert max(sizes.values()) < MAX_BYTES, sizes
    job = next(document for document in train if document["kind"] == "RayJob")
    assert job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["maxReplicas"] == workers


@pytest.mark.slow
@pytest.mark.parametrize("chart", CHARTS)
def test_variable_that_the_chart_sets_itself_is_refused_in_words(chart: Chart) -> None:
    case = next(case for case in CASES if case.chart == chart and case.name in ("all at once", "watched", "database"))
    documents = render(chart, case.values, name="n", api_versions=APIS[-1])
    ours = sorted(
        {it["name"] for document in documents for pod in pod_templates(document) for box in pod.containers for it in box.get("env", ())}
    )
    assert "HOME" in ours
    values = [{"env": [{"name": name, "value": "x"}]} for name in ours] + [{"env": [{"name": "A", "value": "x"}] * 2}]
    for changes in values:
        with pytest.raises(ConfigError, match=r"/env/0/name|env names \w+ twice|env \w+ is given twice"):
            render(chart, over(case.values, changes), name="n", api_versions=APIS[-1])


@pytest.mark.parametrize(
    ("toleration", "said"),
    [
        ({"key": "spot", "operator": "Exists", "value": "yes"}, "beside the operator Exists"),
        ({"effect": "NoSchedule"}, "for the operator Exists alone"),
        ({"key": "spot", "value": "yes", "tolerationSeconds": 5}, "for the effect NoExecute"),
    ],
)
def test_toleration_whose_parts_do_not_fit_is_refused_by_template_and_model(toleration: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        render("tracking", {"tolerations": [toleration]}, name="n")
    with pytest.raises(ValidationError, match=said):
        Toleration.model_validate(toleration)


def test_variable_that_is_given_twice_is_refused_in_words() -> None:
    with pytest.raises(ConfigError, match="env A is given twice"):
        render("tracking", {"env": [{"name": "A", "value": "x"}] * 2}, name="n")


@pytest.mark.parametrize("chart", CHARTS)
def test_misspelt_value_anywhere_is_refused_at_its_path(chart: Chart) -> None:
    found = leaves(chart)

    @settings(max_examples=50, deadline=None, derandomize=True, database=None)
    @given(st.sampled_from(found), st.integers(0, 9))
    def check(leaf: tuple[tuple[str, ...], Any], at: int) -> None:
        path, _ = leaf
        key = path[-1][: at % len(path[-1])] + "Q" + path[-1][at % len(path[-1]) :]
        values: dict[str, Any] = {}
        put(values, (*path[:-1], key), 1)
        assert any(where == path[:-1] and repr(key) in text for where, text in refusals(chart, values)), path

    check()


@pytest.mark.parametrize("chart", CHARTS)
def test_value_of_a_wrong_type_anywhere_is_refused_at_its_path(chart: Chart) -> None:
    found = leaves(chart)
    assert len(found) > 60
    for path, _ in found:
        values: dict[str, Any] = {}
        put(values, path, [[[]]])
        where = [where for where, _ in refusals(chart, values)]
        assert any(at[: len(path)] == path for at in where), path


@pytest.mark.parametrize(
    ("chart", "values", "path"),
    [
        ("serving", {"gateway": {"replcas": 2}}, "/gateway"),
        ("serving", {"config": {"serve": {"num_replicas": "two"}}}, "/config/serve/num_replicas"),
        ("tracking", {"storage": {"size": ["10Gi"]}}, "/storage/size"),
        ("training", {"workers": {"resources": {"limit": {}}}}, "/workers/resources"),
        ("training", {"config": {"train": {"epocs": 2}}}, "/config/train"),
        ("training", {"image": {"tag": "latest"}}, "/image/tag"),
    ],
)
def test_misuse_is_refused_by_helm_with_the_same_path(chart: Chart, values: dict[str, Any], path: str) -> None:
    with pytest.raises(ConfigError, match=f"'{path}"):
        render(chart, values, name="n")


def test_matrix_ends_with_its_count_and_fails_on_an_invalid_manifest(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good = next(case for case in CASES if (case.chart, case.name) == ("tracking", "volume"))
    bad = Case("tracking", "passed on as it is, and wrong", {"affinity": {"nodeAffinity": {"preferred": 1}}})
    monkeypatch.setattr(matrix, "scan_problems", lambda *_: [])
    for case, last, code in ((good, r"charts: \d+ manifests, 0 invalid", 0), (bad, r"charts: \d+ manifests, [1-9]\d* invalid", 1)):
        monkeypatch.setattr(matrix, "CASES", (case,))
        monkeypatch.setattr(matrix, "renderings", lambda cases: [Rendering(cases[0], None, KUBE_VERSIONS[1], ())])
        assert matrix.main() == code
        assert re.fullmatch(last, capsys.readouterr().out.splitlines()[-1])
