"""Cross entropy at supervised positions only, without ever holding all logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

CHUNK_ROWS = 128  # rows of one product with the head: 128 x 49,152 logits are 13 MB in bf16
BLOCK_ROWS = 8  # rows of one pass in fp32, 1.6 MB: six passes over a whole chunk went to memory each time and took as long as the products


class SupervisedLoss(torch.autograd.Function):  # type: ignore[misc]
    """hidden (S, H), head (V, H), targets (S) -> fp32 losses (S), not reduced; the head is frozen.

    For a loss l = logsumexp(z) - z[target] with z = head h the gradient is dl/dh = head^T (softmax(z) - onehot(target)), so it is
    computed chunk by chunk in the forward pass, and scaled by the loss's own weight in the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        """The losses; the unweighted gradient is kept."""
        losses = torch.empty(len(targets), dtype=torch.float32)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(targets), CHUNK_ROWS):
            part = slice(start, start + CHUNK_ROWS)
            logits = nn.functional.linear(hidden[part], head)
            losses[part] = _take_losses(logits, targets[part], into_errors=gradient is not None)
            if gradient is not None:
                gradient[part] = logits @ head
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradient of hidden, each row weighted by the gradient of its own loss."""
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0][:, None].to(gradient.dtype), None, None


def _take_losses(logits: Tensor, targets: Tensor, into_errors: bool) -> Tensor:
    """The fp32 losses (S) of logits z (S, V), which become softmax(z) - onehot(target) in place where asked, else have no meaning after."""
    losses = []
    for block, wanted in zip(logits.split(BLOCK_ROWS), targets.split(BLOCK_ROWS), strict=True):
        scores = block.float()
        scores -= scores.amax(dim=-1, keepdim=True)
        chosen = scores.gather(1, wanted[:, None])[:, 0]
        total = scores.exp_().sum(dim=-1)
        losses.append(total.log() - chosen)
        if into_errors:
            scores *= total.reciprocal()[:, None]
            scores[torch.arange(len(wanted)), wanted] -= 1
            block.copy_(scores)
    return torch.cat(losses)
