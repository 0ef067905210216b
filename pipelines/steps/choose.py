"""Which of the candidates for serving goes on: each is judged by the same gates, and the cheapest that passes is taken.

- Cheap is small on disk first, since bytes read decide what a token costs: within BYTES_TOLERANCE of the smallest all count as equal.
- Of those the fastest with several requests at once: within SPEED_TOLERANCE, which a busy machine makes of nothing, all count as equal.
- Of those the one with the best score; a tie goes to the one that the spec names first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from infra.files import read_json
from pipelines.step import Artifact
from serving.formats import CHEAPEST

CANDIDATES_NAME = "candidates.json"
SPEED_NAME = "speed.json"
BYTES_TOLERANCE = 0.05
SPEED_TOLERANCE = 0.10
FREE_FORMAT, AWARE_FORMAT = "openvino-int4", "openvino-int4-awq"
Candidate = dict[str, Any]


def candidate(
    name: str,
    model: Artifact,
    answers_dir: Path,
    score: Mapping[str, float],
    change: Mapping[str, float],
    gates: Sequence[Mapping[str, Any]],
) -> Candidate:
    """What is known of one candidate: its gates, score, change of score against what was trained, size and speed."""
    speed = read_json(answers_dir / SPEED_NAME)
    single, several = speed[min(speed, key=int)], speed[max(speed, key=int)]
    facts = model.manifest.model
    return {
        "format": name,
        "score": dict(score),
        "change": dict(change),
        "bytes": sum(entry.size_bytes for entry in model.manifest.files.values()),
        "tokens_per_s": several["tokens_per_s"],
        "ms_per_token": single["ms_per_token"],
        "speed": speed,
        "weights": facts.weights.model_dump(mode="json") if facts and facts.weights else None,
        "gates": list(gates),
        "passed": all(gate["passed"] for gate in gates),
    }


def choose(candidates: Sequence[Candidate], wanted: str) -> dict[str, Any]:
    """The content of candidates.json: all of them, each chosen or not and why, and `selected`, whose gates are those of the run."""
    passed = [each for each in candidates if each["passed"] and wanted in (CHEAPEST, each["format"])]
    best = cheapest(passed) if passed else best_refused(candidates, wanted)
    judged = [{**each, "chosen": bool(passed) and each is best, "why": _why(each, best, bool(passed), wanted)} for each in candidates]
    return {
        "choose": wanted,
        "selected": best["format"],
        "passed": bool(passed),
        "candidates": judged,
        "comparison": comparison(candidates),
    }


def cheapest(candidates: Sequence[Candidate]) -> Candidate:
    """The smallest; among the nearly smallest the fastest, and among the nearly fastest the best."""
    most_bytes = min(each["bytes"] for each in candidates) * (1 + BYTES_TOLERANCE)
    small = [each for each in candidates if each["bytes"] <= most_bytes]
    least_speed = max(each["tokens_per_s"] for each in small) * (1 - SPEED_TOLERANCE)
    return max((each for each in small if each["tokens_per_s"] >= least_speed), key=lambda each: each["score"]["value"])


def best_refused(candidates: Sequence[Candidate], wanted: str) -> Candidate:
    """Where none passes: the one that was asked for by name, or else the one with the best score."""
    named = [each for each in candidates if each["format"] == wanted]
    return named[0] if named else max(candidates, key=lambda each: each["score"]["value"])


def _why(each: Candidate, best: Candidate, is_any_passed: bool, wanted: str) -> str:
    refused = [gate["name"] for gate in each["gates"] if not gate["passed"]]
    if refused:
        return f"refused: {', '.join(refused)}" + (" (the best of those refused)" if each is best and not is_any_passed else "")
    if each is best:
        return "the cheapest that passes" if wanted == CHEAPEST else "asked for by name"
    if wanted != CHEAPEST:
        return f"passes; quantize.choose asks for {wanted}"
    larger, slower = each["bytes"] / best["bytes"] - 1, 1 - each["tokens_per_s"] / best["tokens_per_s"]
    if larger > BYTES_TOLERANCE:
        return f"passes; {larger:.0%} larger than {best['format']}"
    if slower > SPEED_TOLERANCE:
        return f"passes; as small as {best['format']}, {slower:.0%} slower"
    return f"passes; as small and fast as {best['format']}, whose score is as good or better"


def comparison(candidates: Sequence[Candidate]) -> str | None:
    """Whether looking at data halves what 4 bits lose, in words; None where not both ways of rounding were tried."""
    change = {each["format"]: each["change"] for each in candidates}
    if not {FREE_FORMAT, AWARE_FORMAT} <= set(change):
        return None
    free, aware = (max(0.0, -change[name]["value"]) for name in (FREE_FORMAT, AWARE_FORMAT))
    shown = f"data-aware INT4 loses {_loss(change[AWARE_FORMAT])}, data-free INT4 {_loss(change[FREE_FORMAT])}"
    if not free:
        return f"{shown}: there is no loss to halve"
    return f"{shown}: {'at most half' if aware <= free / 2 else 'more than half'} of it remains"


def _loss(change: Mapping[str, float]) -> str:
    """A change of score as a loss with its interval."""
    return f"{0 - change['value']:.3f} ({0 - change['high']:+.3f} to {0 - change['low']:+.3f})"


def candidate_columns(choice: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The candidates as columns of a table; intervals have columns of their own."""
    plain = ("format", "chosen", "passed", "why", "bytes", "tokens_per_s", "ms_per_token")
    spread = ("value", "low", "high")
    rows = choice["candidates"]
    columns = {name: [each[name] for each in rows] for name in plain}
    return columns | {f"{key}_{part}": [each[key][part] for each in rows] for key in ("score", "change") for part in spread}


def chosen(artifacts: Mapping[str, Artifact]) -> Artifact:
    """Of a run's artifacts by step: the candidate that was chosen, or the one whose gates refused the run."""
    return artifacts[f"quantize-{read_json(artifacts['gate'].path / CANDIDATES_NAME)['selected']}"]
