"""Pictures of a run for the MLflow UI, drawn by the driver."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INCHES = (7.0, 4.0)
METRIC_INCHES = 2.0
CONFUSION_INCHES = 5.0


def draw(report: Mapping[str, Any]) -> dict[str, Figure]:
    """Figures by file name: losses and learning rate by step, every model's metrics with intervals, what the candidates for serving
    cost against what they score, and confused labels where they are asked for.
    """
    figures = {"plots/loss.png": losses(report["training"]), "plots/scores.png": scores(report["scores"])}
    figures["plots/candidates.png"] = tradeoff(report["candidates"]["candidates"])
    confused = {model: found["confusion"] for model, found in report["details"].items() if "confusion" in found}
    return {**figures, "plots/confusion.png": confusion(confused)} if confused else figures


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
    """One panel a metric, one bar a model with its interval; slices are left out."""
    metrics = list(dict.fromkeys(metric for found in by_model.values() for metric in found if "/" not in metric))
    figure = _figure(height=max(INCHES[1], METRIC_INCHES * len(metrics)))
    for axes, metric in zip(figure.subplots(len(metrics), 1, squeeze=False)[:, 0], metrics, strict=True):
        measured = {model: found[metric] for model, found in by_model.items() if metric in found}
        values = [each["value"] for each in measured.values()]
        below = [each["value"] - each["low"] for each in measured.values()]
        above = [each["high"] - each["value"] for each in measured.values()]
        axes.bar(list(measured), values, yerr=[below, above], capsize=4)
        axes.set_ylabel(metric)
        axes.set_ylim(0, 1.05 * max(1.0, *(each["high"] for each in measured.values())))
    return figure


def confusion(by_model: Mapping[str, Mapping[str, Any]]) -> Figure:
    """One panel a model: rows are expected labels, columns answered ones, the shade the share of an expected label's rows."""
    figure = _figure(width=CONFUSION_INCHES * len(by_model), height=CONFUSION_INCHES)
    for axes, (model, found) in zip(figure.subplots(1, len(by_model), squeeze=False)[0], by_model.items(), strict=True):
        labels, counts = found["labels"], found["counts"]
        axes.imshow([[count / max(sum(row), 1) for count in row] for row in counts], cmap="Blues", vmin=0, vmax=1)
        axes.set(title=model, xlabel="answered", ylabel="expected")
        axes.set_xticks(range(len(labels)), labels, rotation=90, fontsize="x-small")
        axes.set_yticks(range(len(labels)), labels, fontsize="x-small")
        for row, column in ((row, column) for row, line in enumerate(counts) for column, count in enumerate(line) if count):
            shade = counts[row][column] / sum(counts[row])
            axes.text(
                column, row, counts[row][column], ha="center", va="center", fontsize="x-small", color="white" if shade > 0.5 else "black"
            )
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
        axes.set_xlim(0, 1.5 * max(each[key] / unit for each in candidates))
    left.set_ylabel("score; green: chosen, red: refused")
    return figure


def _figure(width: float = INCHES[0], height: float = INCHES[1]) -> Figure:
    """A figure of its own, since pyplot keeps state and wants a display; the import takes half a second, so it happens here."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _columns(points: Sequence[Sequence[float]]) -> tuple[list[float], list[float]]:
    """[[step, value]] as steps and values."""
    return [point[0] for point in points], [point[1] for point in points]
