"""Values nobody thought of: whatever a chart's schema takes renders to valid manifests, or is refused in words."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from infra.errors import ConfigError
from pipelines.charts import Chart, render
from tests.charts.cases import CASES, KUBE_VERSIONS, MONITORING, NAMESPACE, RELEASE, Case, over
from tests.charts.drawn import changes
from tests.charts.judge import judge, known_kinds, needs_kuberay
from tests.charts.matrix import given_names

BASES: dict[Chart, Case] = {case.chart: case for case in CASES if case.name in ("all at once", "watched", "database")}
# What a template says when it was not ready for a value, in place of words for whoever gave it.
CRASHES = re.compile(
    "nil pointer|can't evaluate field|wrong type for value|error converting YAML|YAML parse error|index out of range|cannot unmarshal|"
    "error unmarshaling|incompatible types for comparison|did not find expected|mapping values are not allowed"
)
EVERY = list(HealthCheck)
# Choices that are wise to refuse in our own profiles and a user's own to make, and what only a server's own data can tell.
CHOICES = (
    "protects nothing",
    "lets no node be drained",
    "a limit of memory and a request of CPU are needed",
    "is no time zone",
    # The models compare quantities, templates cannot.
    "is more than the limit",
    # Pods that a driver makes later.
    "selects no pod",
    "selects nothing",
    "is not one of []",
)


def verdict(chart: Chart, values: dict[str, Any]) -> list[str]:
    """What is wrong with what these values render; nothing where they are refused in words."""
    whole = over(BASES[chart].values, values)
    try:
        documents = render(chart, whole, name=RELEASE, namespace=NAMESPACE, kube_version=KUBE_VERSIONS[1], api_versions=MONITORING)
    except ConfigError as error:
        return [error.message] if CRASHES.search(error.message) else []
    known = [document for document in documents if not needs_kuberay([document], known_kinds())]
    later = [document for document in documents if document not in known]
    found = judge(known, KUBE_VERSIONS[1], given=given_names(whole), later=later)
    return [line for line in found if not any(choice in line for choice in CHOICES)]


@pytest.mark.parametrize("chart", BASES)
def test_values_that_the_schema_takes_render_validly_or_are_refused_in_words(chart: Chart) -> None:
    # Not made smaller when it fails: each try is a run of helm.
    @settings(max_examples=3, deadline=None, derandomize=True, database=None, phases=[Phase.generate], suppress_health_check=EVERY)
    @given(changes(chart))
    def check(values: dict[str, Any]) -> None:
        assert verdict(chart, values) == []

    check()


@pytest.mark.slow
@pytest.mark.parametrize("chart", BASES)
def test_values_that_the_schema_takes_render_validly_or_are_refused_in_words_many_times(chart: Chart) -> None:
    @settings(max_examples=100, deadline=None, database=None, suppress_health_check=EVERY, print_blob=True)
    @given(st.one_of(changes(chart, most=1), changes(chart, most=12)))
    def check(values: dict[str, Any]) -> None:
        assert verdict(chart, values) == []

    check()
