"""Cross entropy at supervised positions only, without ever holding all logits."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

CHUNK_BYTES = 64 << 20  # of logits in one product with the head; products of 416 rows took 0.7 of the time of products of 128
BLOCK_ROWS = 16  # rows of one pass in fp32: passes over a whole chunk went to memory each time and took as long as the products


class SupervisedLoss(torch.autograd.Function):  # type: ignore[misc]
    """hidden (S, H), head (V, H), targets (S) -> fp32 losses (S), not reduced.

    For a loss l = logsumexp(z) - z[target] with z = head h the gradients are dl/dh = head^T e and dl/dhead = e h^T with the error
    e = softmax(z) - onehot(target). The first is computed chunk by chunk in the forward pass and scaled by the loss's own weight in the
    backward pass; the second, where the head is trained, needs the weights, so its errors are computed again in the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        """The losses; the unweighted gradient of hidden is kept."""
        losses = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for part in _chunks(targets, head):
            logits = nn.functional.linear(hidden[part], head)
            losses[part] = _take_losses(logits, targets[part], into_errors=gradient is not None)
            if gradient is not None:
                gradient[part] = logits @ head
        is_head_trained = ctx.needs_input_grad[1]
        ctx.save_for_backward(gradient, *((hidden, head, targets) if is_head_trained else ()))
        return losses

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of hidden and of the head, each row weighted by the gradient of its own loss."""
        gradient, *trained = ctx.saved_tensors
        weights = gradients[0][:, None]
        dhead = _head_gradient(*trained, weights=weights) if trained else None
        return None if gradient is None else gradient * weights.to(gradient.dtype), dhead, None


def _head_gradient(hidden: Tensor, head: Tensor, targets: Tensor, *, weights: Tensor) -> Tensor:
    """Sum of w e h^T over all rows, (V, H); added up in fp32."""
    total = torch.zeros(head.shape, dtype=torch.float32, device=head.device)
    for part in _chunks(targets, head):
        errors = nn.functional.linear(hidden[part], head)
        _take_losses(errors, targets[part], into_errors=True)
        total += errors.mul_(weights[part].to(errors.dtype)).t() @ hidden[part]
    return total.to(head.dtype)


def _chunks(targets: Tensor, head: Tensor) -> list[slice]:
    """Slices of equal length, of as many rows as may be held at once."""
    number = math.ceil(len(targets) * len(head) * head.element_size() / CHUNK_BYTES)
    cuts = [len(targets) * part // max(number, 1) for part in range(number + 1)]
    return [slice(start, end) for start, end in pairwise(cuts) if end > start]


def _take_losses(logits: Tensor, targets: Tensor, into_errors: bool) -> Tensor:
    """The fp32 losses (S) of logits z (S, V), which become softmax(z) - onehot(target) in place where asked, else have no meaning after."""
    losses = []
    for block, wanted in zip(logits.split(BLOCK_ROWS), targets.split(BLOCK_ROWS), strict=True):
        scores = block.float()
        behind = scores.amax(dim=-1) - scores.gather(1, wanted[:, None])[:, 0]
        shares = torch.softmax(scores, dim=-1)
        losses.append(behind - shares.amax(dim=-1).log())  # the largest share is never too small for a logarithm
        if into_errors:
            shares[torch.arange(len(wanted), device=wanted.device), wanted] -= 1
            block.copy_(shares)
    return torch.cat(losses)
