"""A model forced through answers that are given: its log-probabilities, token by token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from infra.cases import TOP_TOKENS, Ask, Forced
from training.data.tokens import TokenRow
from training.model import PackModel
from training.packing import make_pack

BATCH_TOKENS = 4096
"""Places of one batch, padding counted: a long chat is computed alone."""


@torch.inference_mode()  # type: ignore[untyped-decorator]
def force(model: Any, asks: Sequence[Ask]) -> list[tuple[str, Forced]]:
    """Each answer with the name of its case; an ask without the reference's likeliest tokens gets this model's."""
    found = []
    packed = PackModel(model)
    for batch in batches(asks):
        pack = make_pack([_as_row(index, ask) for index, ask in enumerate(batch)]).to(model.device)
        logprobs = torch.log_softmax(packed.logits(pack).float(), dim=-1).cpu()
        parts = logprobs.split([len(ask.answer_ids) for ask in batch])
        found += [(ask.name, read_answer(ask, part)) for ask, part in zip(batch, parts, strict=True)]
    return found


def read_answer(ask: Ask, logprobs: Tensor) -> Forced:
    """What log-probabilities (A, V) say of the answer's A tokens."""
    ids = torch.tensor(ask.answer_ids)
    top = torch.tensor(ask.top_ids) if ask.top_ids else logprobs.topk(min(TOP_TOKENS, logprobs.shape[1]), dim=-1).indices
    return Forced(
        source=ask.source,
        ids=ask.answer_ids,
        logprobs=tuple(logprobs.gather(1, ids[:, None])[:, 0].tolist()),
        best_ids=tuple(logprobs.argmax(dim=-1).tolist()),
        top_ids=tuple(map(tuple, top.tolist())),
        top_logprobs=tuple(map(tuple, logprobs.gather(1, top).tolist())),
    )


def batches(asks: Sequence[Ask]) -> Iterator[list[Ask]]:
    """The asks in groups of similar length."""
    batch: list[Ask] = []
    for ask in sorted(asks, key=lambda each: (len(each.ids), each.name, each.source)):
        if batch and (len(batch) + 1) * len(ask.ids) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(ask)
    if batch:
        yield batch


def _as_row(index: int, ask: Ask) -> TokenRow:
    supervised = (False,) * len(ask.prompt_ids) + (True,) * len(ask.answer_ids)
    return TokenRow(index, ask.ids, supervised)
