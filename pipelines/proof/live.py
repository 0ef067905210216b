"""Whether the endpoint is the quantized model: the same prompts, the same log-probabilities of what it says, the same end.

It tells the text of its tokens and not their ids, so they are followed along the trained model's answer by their texts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from infra.cases import Case, Forced, Scored
from infra.chat import ChatCodec
from pipelines.proof.answers import Spoken, greedy_forced
from pipelines.proof.bounds import Bounds
from pipelines.proof.checks import Check, listed
from pipelines.proof.encodings import check_prompt_ids
from pipelines.proof.endpoint import LiveAnswer, token_label


@dataclass(frozen=True)
class Followed:
    """One answer of the endpoint beside the log-probabilities of the model that it should be."""

    differences: tuple[float, ...]
    """Of each token up to the first that leaves the trained model's answer."""
    problem: str
    """Why the endpoint is not that model; empty where it may be."""
    is_same: bool
    """Whether it says what the trained model says."""


def check_live(
    stage: str,
    cases: Sequence[Case],
    live: Mapping[str, LiveAnswer],
    trained: Mapping[str, Scored],
    scored: Mapping[str, Scored],
    spoken: Mapping[str, Spoken],
    codec: ChatCodec,
    stop_ids: Sequence[int],
    context_tokens: int,
    bounds: Bounds,
) -> list[Check]:
    """The checks of one endpoint; `scored` is its model's, and `spoken` what the trained model answers."""
    ids = {name: Scored(name=name, prompt_ids=each.prompt_ids, refusal=each.refusal) for name, each in live.items()}
    paths: dict[str, Forced] = {}
    for case in cases:
        if case.name in spoken and not live[case.name].refusal:
            forced = greedy_forced(scored[case.name], spoken[case.name], stop_ids)
            if forced is not None:
                paths[case.name] = forced
    slack = 2 * bounds.max
    loosely = [follow(live[name], forced, codec, stop_ids, slack) for name, forced in paths.items()]
    slack = min(slack, tie_slack([value for each in loosely for value in each.differences], bounds))
    followed = {name: follow(live[name], forced, codec, stop_ids, slack) for name, forced in paths.items()}
    prompts = check_prompt_ids(stage, cases, trained, ids, None)
    return [prompts, _check_context(stage, live, context_tokens), _check_logprobs(stage, followed, bounds), _check_answers(stage, followed)]


def tie_slack(differences: Sequence[float], bounds: Bounds) -> float:
    """Nats within which two tokens may change places: four times the largest difference seen, since others may be larger, and some more.

    A fixed width lets a faithful endpoint run past a stop token: 5 nats hid one that its model said with a probability of 0.97.
    """
    return 4 * max(differences, default=0.0) + 2 * bounds.mean


def follow(live: LiveAnswer, forced: Forced, codec: ChatCodec, stop_ids: Sequence[int], slack: float) -> Followed:
    """One answer beside what its model says of the trained model's; two tokens within `slack` nats of each other are a tie."""
    found: list[float] = []
    for place, (text, logprob) in enumerate(zip(live.tokens, live.logprobs, strict=True)):
        if place >= len(forced.ids):
            return Followed(tuple(found), "", False)
        token = forced.ids[place]
        if token in stop_ids or text != _label(codec, token):
            return Followed(tuple(found), _departure(text, place, forced, codec, stop_ids, slack), False)
        found.append(abs(logprob - forced.logprobs[place]))
    return Followed(tuple(found), *_ending(live, forced, stop_ids, slack))


def _departure(text: str, place: int, forced: Forced, codec: ChatCodec, stop_ids: Sequence[int], slack: float) -> str:
    """Why the endpoint may not say `text` where the trained model says something else; empty where its own model may."""
    stops = {_label(codec, each) for each in stop_ids}
    if text in stops:
        return f"says {text!r} at token {place} and goes on: other stop ids at the server"
    best = forced.best_ids[place]  # which may be none of the trained model's likeliest
    known = (best, *(forced.top_ids[place] if forced.top_ids else ()))
    if forced.gap(place, [token for token in known if _label(codec, token) == text]) <= slack:
        return ""
    if best in stop_ids:
        return f"goes on at token {place}, where its model stops: other stop ids at the server"
    return f"says {text!r} at token {place}, where its model says {_label(codec, best)!r}: another model is served"


def _ending(live: LiveAnswer, forced: Forced, stop_ids: Sequence[int], slack: float) -> tuple[str, bool]:
    """What is wrong with the end of an answer that has not left the trained model's, and whether it is that answer."""
    place = len(live.tokens)
    if place >= len(forced.ids):
        return "", not live.has_ended
    if not live.has_ended or forced.ids[place] in stop_ids:
        return "", live.has_ended or forced.ids[place] in stop_ids
    if forced.gap(place, stop_ids) <= slack:
        return "", False
    return f"stops at token {place}, where its model goes on: other stop ids at the server", False


def _label(codec: ChatCodec, token: int) -> str:
    return token_label(codec.token_text(token), codec.token_bytes(token))


def _check_context(stage: str, live: Mapping[str, LiveAnswer], context_tokens: int) -> Check:
    answered = [each for each in live.values() if not each.refusal]
    contexts = sorted({each.context_tokens for each in answered})
    problems = []
    if answered and contexts != [context_tokens]:
        problems.append(f"it takes {contexts} tokens and the base {context_tokens}: context length cut")
    charged = [each for each in answered if each.num_prompt != len(each.prompt_ids)]
    problems += [f"{each.name!r} has {len(each.prompt_ids)} tokens and was charged {each.num_prompt}: a BOS was added" for each in charged]
    return listed(
        "context", stage, f"context and prompt lengths of {len(answered)} chats", problems, f"{context_tokens} tokens, as the base"
    )


def _check_logprobs(stage: str, followed: Mapping[str, Followed], bounds: Bounds) -> Check:
    every = [value for each in followed.values() for value in each.differences]
    mean, worst = (sum(every) / len(every), max(every)) if every else (0.0, 0.0)
    passed = mean <= bounds.mean and worst <= bounds.max
    at = next((name for name, each in followed.items() if worst in each.differences), "")
    return Check(
        name="log-probabilities",
        stage=stage,
        passed=passed,
        compared=f"{len(every)} tokens that the endpoint said, with its model's own log-probabilities ({bounds.reason})",
        found=f"mean {mean:.2g} of {bounds.mean:.2g} allowed, max {worst:.2g} of {bounds.max:.2g} allowed",
        cause="" if passed else f"worst at {at!r}: another model is served, or in another precision",
        figures={"mean": mean, "max": worst, "tokens": len(every)},
    )


def _check_answers(stage: str, followed: Mapping[str, Followed]) -> Check:
    problems = [f"{name!r}: {each.problem}" for name, each in followed.items() if each.problem]
    same = sum(each.is_same for each in followed.values())
    found = f"{same} of {len(followed)} answers are the trained model's, the others follow"
    check = listed("answers", stage, "greedy answers of the endpoint with its model's own log-probabilities", problems, found)
    return check.model_copy(update={"figures": {"same": same, "answers": len(followed)}})
