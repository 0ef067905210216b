"""Cases and answers made by hand, for the comparisons of the certificate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from infra.cases import Case, Forced, Scored

STOP = 2


def case(name: str = "x", **given: Any) -> Case:
    return Case(name=name, kind="adversarial", messages=({"role": "user", "content": "hi"},), **given)


def forced(ids: Sequence[int], logprobs: Sequence[float], best: Sequence[int] | None = None, source: Any = "greedy") -> Forced:
    """An answer of which each token and one other, 99, are known; `best` says which is the likeliest, the token itself where absent."""
    best = list(ids if best is None else best)
    top_ids = tuple((token, 99 if token == top else top) for token, top in zip(ids, best, strict=True))
    others = [logprob - 1 if token == top else logprob + 1 for token, top, logprob in zip(ids, best, logprobs, strict=True)]
    return Forced(
        source=source, ids=tuple(ids), logprobs=tuple(logprobs), best_ids=tuple(best), top_ids=top_ids,
        top_logprobs=tuple(zip(logprobs, others, strict=True)),
    )  # fmt: skip


def scored(*logprobs: float, name: str = "x", ids: Sequence[int] | None = None, **given: Any) -> dict[str, Scored]:
    answer = forced(ids or range(10, 10 + len(logprobs)), logprobs, **given)
    return {name: Scored(name=name, prompt_ids=(1,), forced=(answer,))}
