"""The report of a run; its keys are a public interface."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from infra.evaluation.noise import told
from infra.files import read_json, write_json_atomic, write_text_atomic
from infra.registry import RegisteredVersion
from pipelines.runner import Outcome
from pipelines.spec import Spec
from pipelines.steps.choose import CANDIDATES_NAME
from pipelines.steps.evaluate import COMPARISONS_NAME, DETAILS_NAME, NOISE_NAME, SCORES_NAME
from pipelines.steps.gate import GATES_NAME
from pipelines.steps.prove import CERTIFICATE_NAME

REPORT_NAME = "report.json"
PAGE_NAME = "report.html"
RECEIPT_NAME = "receipt.json"
TRAINING_NAME = "train.json"
SECONDS_PER_HOUR = 3600

_UNSAFE = re.compile(r"[^/\w.\- :]")


def build(spec: Spec, run_id: str, outcome: Outcome, version: RegisteredVersion, serving: Mapping[str, Any] | None) -> dict[str, Any]:
    """The report as design.md names its keys, with training's own figures and the skipped steps beside them."""

    def stored(step: str, name: str) -> Any:
        return read_json(outcome.artifacts[step].path / name)

    return {
        "run_id": run_id,
        "spec_fingerprint": spec.fingerprint,
        "model": {"name": version.name, "version": version.version, "aliases": sorted(version.aliases), "digest": version.digest},
        "scores": stored("evaluate", SCORES_NAME),
        "comparisons": stored("evaluate", COMPARISONS_NAME),
        "details": stored("evaluate", DETAILS_NAME),
        "noise": {name: {**found, "said": told(found)} for name, found in stored("evaluate", NOISE_NAME).items()},
        "gates": stored("gate", GATES_NAME),
        "candidates": stored("gate", CANDIDATES_NAME),
        "parity": stored("prove", CERTIFICATE_NAME),
        "receipt": stored("render", RECEIPT_NAME),
        "training": stored("train", TRAINING_NAME),
        "timings_s": outcome.timings_s,
        "skipped": outcome.skipped,
        "cost": cost(outcome.timings_s, spec.usd_per_hour),
        "serving": serving,
    }


def cost(timings_s: Mapping[str, float], usd_per_hour: float | None) -> dict[str, float | None]:
    """Hours of this machine that the run took, and their price where the spec gives one."""
    hours = sum(timings_s.values()) / SECONDS_PER_HOUR
    return {"hours": hours, "usd_per_hour": usd_per_hour, "usd": None if usd_per_hour is None else hours * usd_per_hour}


def logged_metrics(scores: Mapping[str, Mapping[str, Mapping[str, float]]], timings_s: Mapping[str, float]) -> dict[str, float]:
    """Scores and seconds under names that MLflow takes: a slice `tool=on` is written `tool:on`, other odd characters `_`."""
    named = {f"{model}/{metric}": score["value"] for model, by_metric in scores.items() for metric, score in by_metric.items()}
    safe = {_UNSAFE.sub("_", name.replace("=", ":")): value for name, value in named.items()}
    return safe | {f"seconds/{step}": seconds for step, seconds in timings_s.items()}


def write(report: Mapping[str, Any], folder: Path) -> list[Path]:
    """Writes report.json and the page that shows it; gives both paths."""
    template = jinja2.Environment(autoescape=True).from_string(Path(__file__).with_name(PAGE_NAME).read_text(encoding="utf-8"))
    write_json_atomic(folder / REPORT_NAME, report)
    write_text_atomic(folder / PAGE_NAME, template.render(report=report, charts=charts(report["scores"])))
    return [folder / REPORT_NAME, folder / PAGE_NAME]


def charts(scores: Mapping[str, Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, float]]:
    """Every metric and slice with the value at the right end of its bars: 1, or the highest limit of what may be higher."""
    keys = dict.fromkeys(key for by_metric in scores.values() for key in by_metric)

    highest = {key: max(found[key]["high"] for found in scores.values() if key in found) for key in keys}
    return {key: {"end": max(1.0, high), "is_slice": "/" in key} for key, high in highest.items()}


def files(outcome: Outcome) -> list[Path]:
    """The documents that a reviewer wants beside the run in MLflow."""
    names = [("evaluate", name) for name in (SCORES_NAME, COMPARISONS_NAME, DETAILS_NAME, NOISE_NAME)]
    names += [
        ("gate", GATES_NAME),
        ("gate", CANDIDATES_NAME),
        ("prove", CERTIFICATE_NAME),
        ("render", RECEIPT_NAME),
        ("train", TRAINING_NAME),
    ]
    return [outcome.artifacts[step].path / name for step, name in names if step in outcome.artifacts]
