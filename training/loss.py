"""Cross entropy at supervised positions only, without ever holding all logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

CHUNK_ROWS = 128  # 128 x 49,152 fp32 logits are 25 MB


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
            logits = nn.functional.linear(hidden[part], head).float()
            rows = torch.arange(len(logits))
            logits -= logits.amax(dim=-1, keepdim=True)
            chosen = logits[rows, targets[part]]
            total = logits.exp_().sum(dim=-1)
            losses[part] = total.log() - chosen
            if gradient is not None:
                logits /= total[:, None]
                logits[rows, targets[part]] -= 1
                gradient[part] = logits.to(head.dtype) @ head
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradient of hidden, each row weighted by the gradient of its own loss."""
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0][:, None].to(gradient.dtype), None, None
