"""How likely a model finds the expected answers to the held-out prompts, each token given the true ones before it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from infra.answers import ExpectedLogprob, Prompt
from training.batches import worker_packs
from training.data.tokens import TokenRow
from training.model import PackModel

BATCH_ROWS = 16


@torch.no_grad()  # type: ignore[untyped-decorator]
def expected_logprobs(model: Any, prompts: Sequence[Prompt]) -> list[ExpectedLogprob]:
    """One sum a prompt, in their order; they need the ids of their expected answers."""
    packed = PackModel(model)
    found: dict[int, ExpectedLogprob] = {}
    for pack in worker_packs([_as_row(prompt) for prompt in prompts], BATCH_ROWS, 0, 1):
        on_device = pack.to(model.device)
        losses = packed(on_device).double()
        sums = torch.zeros(pack.num_rows, dtype=torch.double, device=losses.device).index_add_(0, on_device.target_rows, losses)
        counts = torch.bincount(pack.target_rows, minlength=pack.num_rows)
        for row, loss, count in zip(pack.row_numbers, sums.tolist(), counts.tolist(), strict=True):
            found[row] = ExpectedLogprob(row=row, logprob_sum=min(0.0, -loss), num_tokens=count)
    return [found[prompt.row] for prompt in prompts]


def _as_row(prompt: Prompt) -> TokenRow:
    supervised = (False,) * len(prompt.ids) + (True,) * len(prompt.expected_ids)
    return TokenRow(prompt.row, (*prompt.ids, *prompt.expected_ids), supervised)
