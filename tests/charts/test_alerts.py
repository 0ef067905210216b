"""The alerts of the charts wake when they must and not before; and the tests that say so see it where they do not."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable
from typing import Any

import pytest

from tests.charts.alert_tests import RELEASES, failures, rendered_rules, untested
from tests.charts.expressions import promtool

NEEDS_PROMTOOL = pytest.mark.skipif(promtool() is None, reason="promtool is not here: `make charts` fetches it")
THRESHOLD = re.compile(r"> (?P<value>[\d.]+)$")
Change = Callable[[dict[str, Any]], dict[str, Any]]
awake_rules = functools.cache(lambda: rendered_rules("awake"))


@NEEDS_PROMTOOL
@pytest.mark.parametrize("name", RELEASES)
def test_alerts_wake_when_they_must_and_not_before(name: str) -> None:
    assert failures(name, rendered_rules(name)) == []


def test_every_alert_is_asked_for_on_both_sides_of_its_edge() -> None:
    assert untested(awake_rules()) == []
    rules, _ = changed(lambda rule: {"alert": "SlipwayNew"} if rule["alert"] == "SlipwayQueueFull" else {})
    assert untested(rules) == ["alerts/awake.yaml: SlipwayNew is not asked for on both sides"]


def held(minutes: int) -> Change:
    """Alerts that wake so much later."""
    return lambda rule: {"for": f"{wanted}m"} if (wanted := int(rule.get("for", "0m").removesuffix("m")) + minutes) >= 0 else {}


def above(change: Callable[[float], float]) -> Change:
    """Alerts with another threshold."""

    def changed(rule: dict[str, Any]) -> dict[str, Any]:
        found = THRESHOLD.search(rule["expr"])
        return {"expr": f"{rule['expr'][: found.start()]}> {change(float(found['value']))}"} if found else {}

    return changed


def changed(change: Change) -> tuple[dict[str, Any], set[str]]:
    """The rules with a change in each alert that it is for, and the names of these."""
    rules, names = copy.deepcopy(awake_rules()), set()
    for rule in rules["groups"][0]["rules"]:
        if "alert" in rule and (fields := change(rule)):
            names.add(rule["alert"])
            rule.update(fields)
    return rules, names


CHANGES = {
    "a minute later": (held(1), 7),
    "a minute earlier": (held(-1), 6),
    "at twice as much": (above(lambda value: 2 * value or 1), 5),
    "at a little": (above(lambda value: value / 2 or -1), 5),
    "never": (lambda rule: {"expr": f"({rule['expr']}) and vector(0) > 0"}, 7),
}


@NEEDS_PROMTOOL
@pytest.mark.parametrize(("change", "num_alerts"), CHANGES.values(), ids=CHANGES.keys())
def test_alerts_that_wake_otherwise_are_named_each(change: Change, num_alerts: int) -> None:
    rules, names = changed(change)
    (said,) = failures("awake", rules)
    assert len(names) == num_alerts
    assert set(re.findall(r"alertname: (\w+), time", said)) == names
