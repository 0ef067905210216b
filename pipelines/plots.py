"""Pictures of a run for the MLflow UI, drawn by the driver."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INCHES = (7.0, 4.0)


def draw(report: Mapping[str, Any]) -> dict[str, Figure]:
    """Figures by file name: losses and learning rate by step, every model's first metric with its interval, and what
    the candidates for serving cost against what they score.
    """
    figures = {"plots/loss.png": losses(report["training"]), "plots/scores.png": scores(report["scores"])}
    return figures | {"plots/candidates.png": tradeoff(report["candidates"]["candidates"])}


def losses(training: Mapping[str, Sequence[Any]]) -> Figure:
    """Training and held-out loss on the left axis, the learning rate on the right one."""
    figure = _figure()
    left = figure.subplots()
    for name, label in (("loss", "training loss"), ("heldout_loss", "held-out loss")):
        left.plot(*_columns(training[name]), label=label, marker="o" if name == "heldout_loss" else None)
    left.set(xlabel="optimizer step", ylabel="loss of a supervised token", yscale="log")
    right = left.twinx()
    right.plot(*_columns(training["learning_rate"]), color="grey", linestyle="dotted", label="learning rate")
    right.set_ylabel("learning rate")
    figure.legend(loc="upper right", bbox_to_anchor=(1, 1), bbox_transform=left.transAxes)
    return figure


def scores(by_model: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Figure:
    """One bar a model."""
    figure = _figure()
    axes = figure.subplots()
    metric = next(iter(next(iter(by_model.values()))))
    intervals = [found[metric] for found in by_model.values()]
    values = [each["value"] for each in intervals]
    below = [each["value"] - each["low"] for each in intervals]
    above = [each["high"] - each["value"] for each in intervals]
    axes.bar(list(by_model), values, yerr=[below, above], capsize=4)
    axes.set(ylabel=metric, ylim=(0, 1.05))
    return figure


def tradeoff(candidates: Sequence[Mapping[str, Any]]) -> Figure:
    """Score with interval against size on the left, and against tokens/s on the right; a point a candidate, the chosen one in green."""
    figure = _figure()
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, label, key, unit in ((left, "MB on disk", "bytes", 1e6), (right, "tokens/s of several requests", "tokens_per_s", 1.0)):
        for each in candidates:
            score, place = each["score"], each[key] / unit
            spread = [[score["value"] - score["low"]], [score["high"] - score["value"]]]
            color = "tab:green" if each["chosen"] else "tab:blue" if each["passed"] else "tab:red"
            axes.errorbar([place], [score["value"]], yerr=spread, fmt="o", capsize=4, color=color)
            axes.annotate(each["format"], (place, score["value"]), xytext=(4, 4), textcoords="offset points", fontsize="small")
        axes.set_xlabel(label)
        axes.set_xlim(0, 1.3 * max(each[key] / unit for each in candidates))
    left.set_ylabel("score; green: chosen, red: refused")
    return figure


def _figure() -> Figure:
    """A figure of its own, since pyplot keeps state and wants a display; the import takes half a second, so it happens here."""
    from matplotlib.figure import Figure

    return Figure(figsize=INCHES, layout="constrained")


def _columns(points: Sequence[Sequence[float]]) -> tuple[list[float], list[float]]:
    """[[step, value]] as steps and values."""
    return [point[0] for point in points], [point[1] for point in points]
