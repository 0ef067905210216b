"""Picks the next token of one request from its logits, as `Sampling` says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from serving.engines.base import Sampling
from serving.engines.messages import News


class Row:
    """One request: what it was asked, and what it has made."""

    def __init__(self, number: int, prompt_ids: list[int], sampling: Sampling) -> None:
        self.number = number
        self.prompt_ids = prompt_ids
        self.ids = list(prompt_ids)
        """All tokens so far."""
        self.sampling = sampling
        self.made: Counter[int] = Counter()
        self.num_made = 0
        self.last_id = prompt_ids[-1]
        self.random = torch.Generator()
        if sampling.seed is None:
            self.random.seed()
        else:
            self.random.manual_seed(sampling.seed % (1 << 63))


def choose(row: Row, logits: torch.Tensor) -> News:
    """The next token of `row`, noted in it. `logits`: (vocabulary) in 32 bits on the CPU; they are not changed."""
    sampling = row.sampling
    scores = penalized(row, logits)
    if sampling.temperature == 0:
        token = int(scores.argmax())
    else:
        spread = filtered(scores / max(sampling.temperature, 1e-4), sampling)
        token = int(torch.multinomial(spread.softmax(-1), 1, generator=row.random))
    told = None if sampling.logprobs is None else [_told(logits, token, sampling.logprobs)]
    if token in sampling.stop_ids:
        return row.number, [], told and [], "stop", None
    row.last_id = token
    row.ids.append(token)
    row.made[token] += 1
    row.num_made += 1
    return row.number, [token], told, "length" if row.num_made >= sampling.max_tokens else None, None


def choose_while_right(row: Row, logits: torch.Tensor, guess: Sequence[int]) -> tuple[News, int]:
    """The next tokens of `row`, as many as have logits of their own, and how many guesses were right; `logits`: (1 + guesses, vocabulary).

    Each is chosen as it would have been without a guess, so the answer is the same, sampled or not.
    """
    number, ids, told, finish_reason, refusal = choose(row, logits[0])
    num_right = 0
    for token, its_logits in zip(guess, logits[1:], strict=False):
        if finish_reason is not None or token != row.last_id:
            break
        num_right += 1
        _, more_ids, more_told, finish_reason, _ = choose(row, its_logits)
        ids, told = ids + more_ids, None if told is None else told + (more_told or [])
    return (number, ids, told, finish_reason, refusal), num_right


def penalized(row: Row, logits: torch.Tensor) -> torch.Tensor:
    """Logits with the penalties of what was made, and for repetition of the prompt too; (vocabulary).

    Source: frequency and presence as the OpenAI API reference defines them; repetition: Keskar et al., CTRL (arXiv:1909.05858), eq. 2.
    """
    sampling = row.sampling
    if sampling.repetition_penalty != 1:
        seen = torch.tensor(sorted({*row.prompt_ids, *row.made}))
        values = logits[seen]
        penalty = sampling.repetition_penalty
        logits = logits.index_copy(0, seen, torch.where(values > 0, values / penalty, values * penalty))
    if row.made and (sampling.presence_penalty or sampling.frequency_penalty):
        made = torch.tensor(list(row.made))
        counts = torch.tensor(list(row.made.values()), dtype=logits.dtype)
        logits = logits.index_add(0, made, -(sampling.presence_penalty + sampling.frequency_penalty * counts))
    return logits


def filtered(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Logits with minus infinity for what top-k, then top-p, then min-p rule out; the likeliest token always stays."""
    if sampling.top_k is not None and sampling.top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(sampling.top_k).values[-1], -torch.inf)
    if sampling.top_p < 1:
        values, order = logits.softmax(-1).sort(descending=True)
        is_out = torch.empty_like(order, dtype=torch.bool)
        is_out[order] = values.cumsum(-1) - values >= sampling.top_p  # a token stays where those before it lack mass
        logits = logits.masked_fill(is_out, -torch.inf)
    if sampling.min_p > 0:
        odds = logits.softmax(-1)
        logits = logits.masked_fill(odds < sampling.min_p * odds.max(), -torch.inf)
    return logits


def _told(logits: torch.Tensor, token: int, num_top: int) -> Any:
    """`[log-probability of the token, the likeliest as (id, log-probability)]`, by the model itself."""
    logprobs = logits.log_softmax(-1)
    values, ids = logprobs.topk(min(num_top, len(logprobs)))
    return float(logprobs[token]), list(zip(ids.tolist(), values.tolist(), strict=True))
