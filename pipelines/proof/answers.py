"""Whether a stage's greedy answers are those of its own model, and stop where it stops.

An answer may leave the reference's wherever precision turns two tokens round, so sameness alone proves nothing. But at the first token
where it leaves, the stage's own log-probabilities, forced through the same tokens, must have that very token on top.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from infra.cases import Case, Forced, Scored
from pipelines.proof.checks import Check, listed

LATENT = -1
"""Stands for the end of an answer, whichever stop token it was."""


@dataclass(frozen=True)
class Spoken:
    """One stage's greedy answer to one case."""

    ids: tuple[int, ...]
    has_ended: bool

    def tokens(self, stop_ids: Collection[int]) -> tuple[int, ...]:
        """The answer with the end as a token of its own."""
        return (*(LATENT if each in stop_ids else each for each in self.ids), *((LATENT,) if self.has_ended else ()))


def greedy_forced(scored: Scored, greedy: Spoken, stop_ids: Sequence[int]) -> Forced | None:
    """What a stage said when it was forced through the reference's greedy answer, which may be the row's own."""
    wanted = greedy.tokens(stop_ids)
    return next((each for each in scored.forced if Spoken(each.ids, False).tokens(stop_ids) == wanted), None)


def check_answers(
    stage: str,
    cases: Sequence[Case],
    spoken: Mapping[str, Spoken],
    reference: Mapping[str, Spoken],
    scored: Mapping[str, Scored],
    stop_ids: Sequence[int],
    slack: float,
) -> Check:
    """Whether the answers of `stage` follow from what it says when forced; two tokens within `slack` nats of each other are a tie."""
    problems, same, compared = [], 0, 0
    for case in cases:
        if case.name not in spoken or case.name not in reference:
            continue
        compared += 1
        same += spoken[case.name] == reference[case.name]
        forced = greedy_forced(scored[case.name], reference[case.name], stop_ids)
        if forced is not None and (note := _problem(spoken[case.name], forced, stop_ids, slack)):
            problems.append(f"{case.name!r}: {note}")
    found = f"{same} of {compared} answers are the trained model's"
    check = listed("answers", stage, f"greedy answers of {stage} with its own log-probabilities", problems, f"{found}, the others follow")
    return check.model_copy(update={"figures": {"same": same, "answers": compared}})


def _problem(spoken: Spoken, forced: Forced, stop_ids: Sequence[int], slack: float) -> str:
    """Why one answer does not follow; empty where it does."""
    said, path = spoken.tokens(stop_ids), Spoken(forced.ids, False).tokens(stop_ids)
    for place, (token, through) in enumerate(zip(said, path, strict=False)):
        best = LATENT if forced.best_ids[place] in stop_ids else forced.best_ids[place]
        if token != best and not _is_tie(forced, place, token, stop_ids, slack):
            return _words(place, token, best)
        if token != through:
            return ""  # from here on it goes its own way, and was right to
    if len(said) < len(path) and not spoken.has_ended:
        return ""  # it was cut at its longest
    if len(said) > len(path) and path and path[-1] == LATENT:
        return f"goes on after token {len(path) - 1}, where its own model stops: other stop ids"
    return ""


def _is_tie(forced: Forced, place: int, token: int, stop_ids: Sequence[int], slack: float) -> bool:
    if not forced.top_ids:
        return True
    known = dict(zip(forced.top_ids[place], forced.top_logprobs[place], strict=True))
    wanted = stop_ids if token == LATENT else (token,)
    own = [known[each] for each in wanted if each in known]
    return bool(own) and max(known.values()) - max(own) <= slack


def _words(place: int, token: int, best: int) -> str:
    if best == LATENT:
        return f"goes on at token {place}, where its own model stops: other stop ids"
    if token == LATENT:
        return f"stops at token {place}, where its own model goes on: other stop ids"
    return f"says {token} at token {place}, where its own model says {best}: answers of another model or run"
