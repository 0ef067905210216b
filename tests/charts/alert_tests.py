"""The alerts that the charts render, asked by `promtool test rules` for what they wake and for what they do not (alerts/*.yaml)."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from pipelines.charts import Chart, render
from tests.charts.cases import MONITORING, NAMESPACE, RELEASE, SERVED, UNSIGNED, over
from tests.charts.expressions import promtool

ALERTS = Path(__file__).with_name("alerts")
RULES_NAME = "rules.yaml"
WITH_RULES = over(SERVED, UNSIGNED, {"monitoring": {"rules": {"enabled": True}}})
SLEEPS = {"config": {"serve": {"autoscale": {"min_replicas": 0, "max_replicas": 1}}}}
OWN_THRESHOLDS = {"monitoring": {"rules": {"errorPercent": 5, "ttftSeconds": 0.5, "holdMinutes": 2}}}
RELEASES: dict[str, tuple[Chart, Mapping[str, Any]]] = {
    "awake": ("serving", WITH_RULES),
    "asleep": ("serving", over(WITH_RULES, SLEEPS, OWN_THRESHOLDS)),
}
"""What `rules.yaml` is for each file of tests: a chart with its values."""


def rendered_rules(name: str) -> dict[str, Any]:
    """The groups of rules that the tests of that name are about."""
    chart, values = RELEASES[name]
    documents = render(chart, values, name=RELEASE, namespace=NAMESPACE, api_versions=MONITORING)
    (found,) = [document["spec"] for document in documents if document["kind"] == "PrometheusRule"]
    return dict(found)


def alert_problems(say: Callable[[str], object]) -> list[str]:
    """What promtool and `untested` say of the rules of all releases; says so where promtool is not here."""
    if promtool() is None:
        say("promtool is not here: no alert is tested")
        return []
    return untested(rendered_rules("awake")) + [line for name in RELEASES for line in failures(name, rendered_rules(name))]


def failures(name: str, rules: Mapping[str, Any]) -> list[str]:
    """What `promtool test rules` says where the rules do other than the tests of that name want; empty where they do that."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / RULES_NAME).write_text(yaml.safe_dump(dict(rules)))
        tests = shutil.copy(ALERTS / f"{name}.yaml", folder)
        done = subprocess.run([str(promtool()), "test", "rules", tests], capture_output=True, text=True, timeout=60, check=False)
    return [f"alerts/{name}.yaml: {(done.stderr or done.stdout).strip()}"] if done.returncode else []


def untested(rules: Mapping[str, Any]) -> list[str]:
    """Alerts that no test wants to wake, or none to let sleep."""
    groups = yaml.safe_load((ALERTS / "awake.yaml").read_text())["tests"]
    wanted = {(each["alertname"], bool(each["exp_alerts"])) for group in groups for each in group["alert_rule_test"]}
    alerts = [rule["alert"] for group in rules["groups"] for rule in group["rules"] if "alert" in rule]
    return [
        f"alerts/awake.yaml: {alert} is not asked for on both sides" for alert in alerts if not {(alert, True), (alert, False)} <= wanted
    ]
