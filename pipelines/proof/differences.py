"""How far the log-probabilities of two stages lie apart, over all tokens that both were forced through."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from infra.cases import Forced, Scored
from pipelines.proof.bounds import EFFECT, Bounds
from pipelines.proof.checks import Check

LEAST_MASS = 1e-9


@dataclass(frozen=True)
class Differences:
    """Over the tokens of all answers."""

    num_tokens: int
    mean: float
    max: float
    kl: float
    """Mean, over those tokens at which the reference's likeliest are known."""
    worst_case: str
    """The chat with the largest difference of all."""
    mean_by_case: Mapping[str, float]
    is_finite: bool

    @property
    def figures(self) -> dict[str, float]:
        """The numbers, for a certificate."""
        return {"mean": self.mean, "max": self.max, "kl": self.kl, "tokens": self.num_tokens}


def differences(reference: Mapping[str, Scored], other: Mapping[str, Scored]) -> Differences:
    """Of the answers that both have."""
    by_case: dict[str, list[float]] = {}
    divergences: list[float] = []
    for name, one, two in pairs(reference, other):
        by_case.setdefault(name, []).extend(abs(a - b) for a, b in zip(one.logprobs, two.logprobs, strict=True))
        divergences += [kl(*each) for each in zip(one.top_logprobs, two.top_logprobs, strict=False)]
    every = [value for values in by_case.values() for value in values]
    worst = max(by_case, key=lambda name: max(by_case[name]), default="")
    return Differences(
        num_tokens=len(every),
        mean=_mean(every),
        max=max(every, default=0.0),
        kl=_mean(divergences),
        worst_case=worst,
        mean_by_case={name: _mean(values) for name, values in by_case.items()},
        is_finite=all(map(math.isfinite, [*every, *divergences])),
    )


def pairs(reference: Mapping[str, Scored], other: Mapping[str, Scored]) -> list[tuple[str, Forced, Forced]]:
    """The answers that both were forced through, with the name of their case."""
    found = []
    for name, scored in other.items():
        told = {each.source: each for each in reference[name].forced} if name in reference else {}
        found += [(name, told[each.source], each) for each in scored.forced if each.source in told and told[each.source].ids == each.ids]
    return found


def kl(p: tuple[float, ...], q: tuple[float, ...]) -> float:
    """KL(p || q) from log-probabilities of the same tokens, all others taken together; never more than that of the whole distributions."""
    rest_p, rest_q = (max(1 - math.fsum(map(math.exp, each)), LEAST_MASS) for each in (p, q))
    inside = math.fsum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True))
    return max(inside + rest_p * math.log(rest_p / rest_q), 0.0)


def check_logprobs(
    stage: str, reference: Mapping[str, Scored], other: Mapping[str, Scored], base: Mapping[str, Scored], bounds: Bounds, trained: str
) -> Check:
    """Whether a stage's model is the trained one; `trained` is that one's name."""
    found = differences(reference, other)
    is_near = found.is_finite and found.mean <= bounds.mean and found.max <= bounds.max and found.kl <= bounds.kl
    return Check(
        name="log-probabilities",
        stage=stage,
        passed=bool(found.num_tokens) and is_near,
        compared=f"{found.num_tokens} tokens of the same answers, by {stage} and by {trained} ({bounds.reason})",
        found=", ".join(f"{name} {getattr(found, name):.2g} of {getattr(bounds, name):.2g} allowed" for name in ("mean", "max", "kl")),
        cause="" if is_near and found.num_tokens else _cause(found, reference, other, base, bounds),
        figures=found.figures,
    )


def _cause(
    found: Differences, reference: Mapping[str, Scored], other: Mapping[str, Scored], base: Mapping[str, Scored], bounds: Bounds
) -> str:
    if not found.num_tokens:
        return "not one answer could be compared"
    if not found.is_finite:
        return "some are not finite: weights are damaged, or the precision overflows"
    factor = part_of_effect(reference, other, base)
    if factor is not None and factor < 0.2:
        return f"{factor:.0%} of what training changed is left, so it is the base: the adapter was not loaded or not merged"
    far = [name for name, mean in found.mean_by_case.items() if mean > bounds.mean]
    if far == ["long"]:
        return "only the long chat differs: rope scaling or context length was lost"
    at = f"worst at {found.worst_case!r}"
    if factor is not None and abs(factor - 1) > 0.2:
        return f"{at}; {factor:.0%} of what training changed is there: wrong alpha or scaling, or a layer was left out"
    return f"{at}; other weights: another run's, a damaged or swapped file, a wrong base, or coarser numbers than the format says"


def part_of_effect(reference: Mapping[str, Scored], other: Mapping[str, Scored], base: Mapping[str, Scored]) -> float | None:
    """How much of the change from base to trained model a stage shows: 0 is the base, 1 the trained model; None where there is none.

    The factor f for which base + f (trained - base) is nearest to the stage, over the log-probabilities of the answers.
    """
    product = square = 0.0
    stages = {(name, each.source): each for name, scored in other.items() for each in scored.forced}
    for name, trained, untrained in pairs(reference, base):
        if (stage := stages.get((name, trained.source))) is None or stage.ids != trained.ids:
            continue
        for t, b, s in zip(trained.logprobs, untrained.logprobs, stage.logprobs, strict=True):
            product += (t - b) * (s - b)
            square += (t - b) ** 2
    return product / square if square > LEAST_MASS else None


def check_effect(stage: str, reference: Mapping[str, Scored], base: Mapping[str, Scored], noise: Bounds) -> Check:
    """Whether the trained model is another than the base."""
    found = differences(reference, base)
    least = EFFECT * noise.mean
    return Check(
        name="effect",
        stage=stage,
        passed=found.mean > least,
        compared=f"{found.num_tokens} tokens of the held-out rows' own answers, by {stage} and by base",
        found=f"mean difference {found.mean:.2g}, more than {least:.2g} needed",
        cause="" if found.mean > least else "the trained model is the base: the adapter was not loaded, or training changed nothing",
        figures=found.figures,
    )


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0
