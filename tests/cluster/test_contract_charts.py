"""Whether a cluster takes what the charts render, by a dry run of every object. Asked of the loopback server, or of a real one."""

from __future__ import annotations

from typing import Any

import pytest

from pipelines.charts import CHARTS_DIR, render
from pipelines.cluster.apply import apply, check_all
from pipelines.cluster.capabilities import api_versions, kube_version
from tests.charts.cases import CASES, Case, profiles_of
from tests.cluster.conftest import Api

HERE = [case for case in CASES if (CHARTS_DIR / case.chart).is_dir()]
FIRST = [next(case for case in HERE if case.chart == chart) for chart in sorted({case.chart for case in HERE})]


def rendered(api: Api, case: Case, profile: str | None) -> list[dict[str, Any]]:
    """What the chart renders for this very cluster; skipped where the cluster lacks a kind that the case is about."""
    known = api_versions(api.cluster)
    if missing := set(case.apis) - set(known):
        pytest.skip(f"the cluster has no {', '.join(sorted(missing))}")
    place: dict[str, Any] = {"name": f"trial-{case.chart}", "namespace": api.namespace, "profile": profile}
    found = render(case.chart, case.values, kube_version=kube_version(api.cluster), api_versions=known, **place)
    if any(each["apiVersion"].startswith("ray.io/") for each in found) and "ray.io/v1" not in known:
        pytest.skip("the cluster has no KubeRay")
    assert found
    return found


def named(case: Case) -> str:
    """The case's name in a list of tests."""
    return f"{case.chart} {case.name}".replace(" ", "-")


@pytest.mark.parametrize("case", FIRST, ids=named)
def test_cluster_takes_each_chart(api: Api, case: Case) -> None:
    manifests = rendered(api, case, profiles_of(case)[0])
    assert {each.change for each in check_all(api.cluster, manifests)} == {"created"}


@pytest.mark.slow
@pytest.mark.parametrize("case", HERE, ids=named)
def test_cluster_takes_each_chart_with_every_profile_and_option(api: Api, case: Case) -> None:
    for profile in profiles_of(case):
        manifests = rendered(api, case, profile)
        assert len(check_all(api.cluster, manifests)) == len(manifests)


@pytest.mark.parametrize("case", FIRST, ids=named)
def test_chart_that_is_applied_again_changes_nothing(api: Api, case: Case) -> None:
    if not api.is_loopback:
        pytest.skip("on a cluster with KubeRay it would start what it describes")
    manifests = rendered(api, case, profiles_of(case)[0])
    assert {apply(api.cluster, each).change for each in manifests} == {"created"}
    assert {apply(api.cluster, each).change for each in manifests} == {"unchanged"}
