"""Every gate as a pure function of what was measured: a name, whether it passed, and a detail that says by how much and what to try.

- What was not measured does not pass.
- A loss within the noise floor is no loss: the same model, asked again, would move as far.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from infra.evaluation.comparison import TOLERANCE, verdict
from infra.evaluation.metrics import POOLED
from infra.evaluation.noise import told as told_noise
from infra.evaluation.statistics import Interval
from infra.evaluation.tasks import PREFIX
from pipelines.measures import GatesConfig, MetricGate

Gate = dict[str, Any]
Scores = Mapping[str, Mapping[str, Mapping[str, float]]]

BASE, MERGED = "base", "merged"
TRAIN_MORE = "Train on more rows or longer (train.epochs)"
FINER = "Try a format that keeps more (quantize.formats) or a smaller quantize.group_size"
WIDER = "allow more in the spec's gates"


@dataclass(frozen=True)
class Evidence:
    """What is known of one candidate beside scores and certificate; absent where nobody measured it."""

    comparisons: Sequence[Mapping[str, Any]] = ()
    """Those of comparisons.json; other models' are passed over."""
    noise: Mapping[str, Any] | None = None
    """The candidate's own part of noise.json."""
    receipt: Mapping[str, Any] = field(default_factory=dict)
    """receipt.json: what became of rows and tokens, by split."""
    size_bytes: int | None = None
    """Of the candidate's folder."""
    latency_s: Interval | None = None
    """Mean seconds of one answer while the engine answers nothing else."""

    def loss_interval(self, model: str, metric: str) -> Interval | None:
        """How much worse the model is than the one it was made from, where that was compared."""
        found = self._compared(model, metric)
        return Interval(**found["loss"]) if found else None

    def rows_needed(self, model: str, metric: str) -> str:
        """Advice on how many rows would show that a loss stays within its margin."""
        rows = (self._compared(model, metric) or {}).get("rows_for_margin")
        return f"{rows} rows would show it four times of five if it stays as it is" if rows else "no number of rows would show it"

    def _compared(self, model: str, metric: str) -> Mapping[str, Any] | None:
        wanted = (model, metric)
        return next((it for it in self.comparisons if (it["model"], it["metric"]) == wanted and it["reference"] != BASE), None)


def at_least(name: str, measured: float | None, threshold: float, advice: str) -> Gate:
    """A figure that must not be lower."""
    if measured is None:
        return _gate(name, False, f"not measured, at least {_shown(threshold)} needed. {advice}.")
    passed = measured >= threshold - TOLERANCE
    missed = "" if passed else f": {_shown(threshold - measured)} too low. {advice}."
    return _gate(name, passed, f"{_shown(measured)}, at least {_shown(threshold)} needed{missed}")


def at_most(name: str, measured: float | None, threshold: float, advice: str) -> Gate:
    """A figure that must not be higher."""
    if measured is None:
        return _gate(name, False, f"not measured, at most {_shown(threshold)} allowed. {advice}.")
    passed = measured <= threshold + TOLERANCE
    missed = "" if passed else f": {_shown(measured - threshold)} too much. {advice}."
    return _gate(name, passed, f"{_shown(measured)}, at most {_shown(threshold)} allowed{missed}")


def score_gates(config: GatesConfig, scores: Scores, served: str, metric: str) -> list[Gate]:
    """The first metric over all rows and over slices."""
    measured, base = _value(scores, served, metric), _value(scores, BASE, metric)
    gates = [at_least(f"{metric} of {served}", measured, config.min_score, f"{TRAIN_MORE}, or lower gates.min_score")]
    for name, threshold in config.min_slice_scores.items():
        advice = (
            f"Add training rows like those of the slice, or lower gates.min_slice_scores; slices are {_slice_names(scores[served], metric)}"
        )
        gates.append(at_least(f"{metric} of {served} on slice {name}", _value(scores, served, f"{metric}/{name}"), threshold, advice))
    if config.min_worst_slice_score is not None:
        gates.append(_worst_slice_gate(config.min_worst_slice_score, config.min_slice_rows, scores[served], metric, served))
    gain = None if measured is None or base is None else measured - base
    gates.append(at_least(f"gain of {served} over base", gain, config.min_gain, f"{TRAIN_MORE}, or lower gates.min_gain"))
    return gates


def loss_gate(name: str, config: GatesConfig, loss: float | None, metric: str, margin: float, served: str, evidence: Evidence) -> Gate:
    """What a candidate may be worse than the model it was made from: by its interval or by the estimate, as the spec says."""
    found = evidence.loss_interval(served, metric)
    if loss is None or (found is None and config.margin_by == "interval"):
        return _gate(name, False, f"not measured, at most {_shown(margin)} allowed. Ask for it in evaluate.metrics.")
    allowed = f"{_shown(loss)}{_limits(found)}, at most {_shown(margin)} allowed"
    said = verdict(found, margin) if found else None
    rows = evidence.rows_needed(served, metric)
    if loss <= margin + TOLERANCE and (config.margin_by == "estimate" or said == "non-inferior"):
        return _gate(name, True, allowed + (f": {said}" if said else "") + (f", {rows}" if said == "undecided" else ""))
    floor = (evidence.noise or {}).get("floor", {}).get(metric, 0.0)
    if evidence.noise and 0 < loss <= floor + TOLERANCE:
        return _gate(name, True, f"{allowed}: within the noise floor of {_shown(floor)} ({told_noise(evidence.noise)})")
    if loss <= margin + TOLERANCE and found:
        beyond = _shown(found.high - margin)
        return _gate(name, False, f"{allowed}: not proven, the interval ends {beyond} beyond it; {rows}. Hold out more rows, or {WIDER}.")
    doubt = ", which may be chance" if said == "undecided" else ""
    return _gate(name, False, f"{allowed}: {_shown(loss - margin)} too much{doubt}. {FINER}, or {WIDER}.")


def metric_gates(config: GatesConfig, scores: Scores, served: str, reference: str, evidence: Evidence) -> list[Gate]:
    """What the spec asks of further metrics."""
    gates: list[Gate] = []
    for metric, asked in config.metrics.items():
        gates += _gates_of_metric(config, metric, asked, scores, served, reference, evidence)
    return gates


def cost_gates(config: GatesConfig, served: str, evidence: Evidence) -> list[Gate]:
    """Latency and size, where the spec asks for them."""
    gates = []
    if config.max_latency_s is not None:
        advice = "Choose a smaller format (quantize.formats) or raise gates.max_latency_s"
        found = evidence.latency_s
        gate = at_most(f"seconds of an answer of {served}", found.value if found else None, config.max_latency_s, advice)
        gates.append(gate | {"detail": f"mean{_limits(found)}: {gate['detail']}"} if found else gate)
    if config.max_size_bytes is not None:
        advice = "Choose a smaller format (quantize.formats) or raise gates.max_size_bytes"
        gates.append(at_most(f"bytes of {served}", evidence.size_bytes, config.max_size_bytes, advice))
    return gates


def task_gates(config: GatesConfig, served: str, evidence: Evidence) -> list[Gate]:
    """The task of lm-evaluation-harness that most was forgotten of, where the spec asks for it: by the served model, or else the merged."""
    if config.max_task_loss is None:
        return []
    compared = [it for it in evidence.comparisons if it["metric"].startswith(PREFIX)]
    model = served if any(it["model"] == served for it in compared) else MERGED
    losses = {it["metric"]: it["loss"]["value"] for it in compared if it["model"] == model}
    title = f"loss of {model} in its worst task"
    if not losses:
        return [at_most(title, None, config.max_task_loss, "No task gave a figure with a standard error: name others in evaluate.lm_eval")]
    worst = max(losses, key=lambda name: (losses[name], name))
    advice = "Train with a lower rate or fewer epochs, mix general rows in, or raise gates.max_task_loss"
    gate = at_most(title, losses[worst], config.max_task_loss, advice)
    return [gate | {"detail": f"{worst}: {gate['detail']}"}]


def receipt_gates(config: GatesConfig, receipt: Mapping[str, Any]) -> list[Gate]:
    """Rows and tokens lost of each split, where the spec asks for them."""
    gates = []
    asked = (("rows", config.max_lost_rows_share), ("tokens", config.max_lost_tokens_share))
    for split in ("train", "heldout"):
        for unit, threshold in asked:
            if threshold is None:
                continue
            found = receipt.get(split)
            lost = None if found is None else 1 - found[f"{unit}_kept"] / max(found[f"{unit}_read"], 1)
            advice = f"Mend or shorten the rows that receipt.json counts as dropped, or raise gates.max_lost_{unit}_share"
            gates.append(at_most(f"{unit} lost of {split}", lost, threshold, advice))
    return gates


def _gates_of_metric(
    config: GatesConfig, metric: str, asked: MetricGate, scores: Scores, served: str, reference: str, evidence: Evidence
) -> list[Gate]:
    measured = _value(scores, served, metric)
    advice = f"{TRAIN_MORE}, or change gates.metrics.{metric}"
    gates = []
    if asked.min is not None:
        gates.append(at_least(f"{metric} of {served}", measured, asked.min, advice))
    if asked.max is not None:
        gates.append(at_most(f"{metric} of {served}, upper bound", measured, asked.max, advice))
    if asked.min_gain is not None:
        loss = loss_of(scores, served, BASE, metric)
        gates.append(at_least(f"gain in {metric} of {served} over base", None if loss is None else -loss, asked.min_gain, advice))
    if asked.max_loss is not None:
        loss = loss_of(scores, served, reference, metric)
        gates.append(loss_gate(f"loss in {metric} by quantization", config, loss, metric, asked.max_loss, served, evidence))
    return gates


def _worst_slice_gate(threshold: float, min_rows: int, scores: Mapping[str, Mapping[str, float]], metric: str, served: str) -> Gate:
    slices = {name: scores[f"{metric}/{name}"] for name in _slice_names(scores, metric)}
    large = {name: found for name, found in slices.items() if found["n"] >= min_rows}
    title = f"{metric} of {served} on its worst slice"
    if not large:
        return at_least(title, None, threshold, f"None of {len(slices)} slices has {min_rows} rows: lower gates.min_slice_rows")
    name = min(large, key=lambda each: (large[each]["value"], each))
    advice = "Add training rows like those of the slice, or lower gates.min_worst_slice_score"
    gate = at_least(title, large[name]["value"], threshold, advice)
    return gate | {"detail": f"{name} of {large[name]['n']:g} rows: {gate['detail']}"}


def _slice_names(scores: Mapping[str, Any], metric: str) -> list[str]:
    return [key.removeprefix(f"{metric}/") for key in scores if key.startswith(f"{metric}/")]


def _value(scores: Scores, model: str, key: str) -> float | None:
    found = scores.get(model, {}).get(key)
    return None if found is None else found["value"]


def loss_of(scores: Scores, model: str, reference: str, metric: str) -> float | None:
    """How much worse `model` is than `reference`, whichever way the metric counts; None where either was not measured."""
    mine, theirs = _value(scores, model, metric), _value(scores, reference, metric)
    if mine is None or theirs is None:
        return None
    return mine - theirs if metric in POOLED and not POOLED[metric].is_better_higher else theirs - mine


def _limits(interval: Interval | None) -> str:
    return "" if interval is None else f" [{_shown(interval.low)}, {_shown(interval.high)}] on {interval.n} rows"


def _shown(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 1000 else f"{value:,.0f}"


def _gate(name: str, passed: bool, detail: str) -> Gate:
    return {"name": name, "passed": passed, "detail": detail}
