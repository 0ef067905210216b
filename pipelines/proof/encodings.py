"""Whether every stage makes the same token ids of the same chat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from infra.cases import Case, Scored
from infra.chat import TOKENIZER_NAME, load_codec
from infra.config import Config
from infra.files import sha256_file
from pipelines.proof.checks import Check

SHOWN_DIGEST_CHARS = 12


class Encoder(Config):
    """What decides how a folder encodes."""

    template: str
    """Digest of the chat template's text."""
    tokenizer: str
    """Digest of tokenizer.json."""
    special_tokens: dict[str, str]


def encoder_of(folder: Path) -> Encoder:
    """The digests of a model folder. Raises ArtifactError where it has no tokenizer or template."""
    codec = load_codec(folder)
    tokens = dict(codec.special_tokens)
    return Encoder(template=codec.template_digest, tokenizer=sha256_file(folder / TOKENIZER_NAME), special_tokens=tokens)


def check_prompt_ids(
    stage: str, cases: Sequence[Case], trained: Mapping[str, Scored], other: Mapping[str, Scored], encoders: tuple[Encoder, Encoder] | None
) -> Check:
    """Whether `stage` makes of each chat what training made of it; `encoders` are those of the base and of the stage's folder."""
    same, problem = 0, ""
    for case in cases:
        if case.name not in other:
            continue
        note = _difference(case, trained[case.name], other[case.name])
        same += not note
        problem = problem or note
    total = sum(case.name in other for case in cases)
    cause = ""
    if problem:
        cause = f"{problem}{_cause(stage, encoders)}"
    elif not total:
        cause = "no chat was encoded"
    return Check(
        name="prompt ids",
        stage=stage,
        passed=not cause,
        compared=f"{total} chats, encoded by {stage} and by the base, as training rendered them",
        found=f"{same} of {total} are the same tokens",
        cause=cause,
        figures={"same": same, "chats": total},
    )


def _difference(case: Case, trained: Scored, other: Scored) -> str:
    """How one chat differs; empty where it does not. A chat that both refuse is the same."""
    if bool(trained.refusal) != bool(other.refusal):
        side = "this stage refuses" if other.refusal else "the base refuses"
        return f"{side} the chat {case.name!r}: {other.refusal or trained.refusal}"
    wanted = trained.prompt_ids if case.rendered_ids is None else case.rendered_ids
    found = other.prompt_ids
    if trained.refusal or found == wanted:
        return ""
    if found[1:] == wanted:
        return f"{case.name!r} begins with one token more, {found[0]}: a BOS was added twice"
    if wanted[1:] == found:
        return f"{case.name!r} begins with one token less, {wanted[0]}: a BOS is missing"
    place = next((index for index, (a, b) in enumerate(zip(found, wanted, strict=False)) if a != b), min(len(found), len(wanted)))
    here, there = (ids[place : place + 1] for ids in (found, wanted))
    return f"prompt ids of {case.name!r} differ at position {place} ({_token(here)} here, {_token(there)} in training)"


def _token(ids: tuple[int, ...]) -> str:
    return str(ids[0]) if ids else "none"


def _cause(stage: str, encoders: tuple[Encoder, Encoder] | None) -> str:
    """In words: which file of the folder is another."""
    if encoders is None:
        return ": the server encodes otherwise than its folder says, or changes the messages first"
    base, own = encoders
    digests = (("chat template", own.template, base.template), ("tokenizer", own.tokenizer, base.tokenizer))
    causes = [
        f"the {what} of {stage} differs: digest {found[:SHOWN_DIGEST_CHARS]}, the base has {wanted[:SHOWN_DIGEST_CHARS]}"
        for what, found, wanted in digests
        if found != wanted
    ]
    if own.special_tokens != base.special_tokens:
        causes.append(f"its special tokens differ: {own.special_tokens}, the base has {base.special_tokens}")
    return f": {'; '.join(causes) or 'training rendered with another template or tokenizer than the base holds now'}"
