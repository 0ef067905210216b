"""Floating-point operations in matrix products with weights, and how many a second this machine can do: the two sides of MFU.

Counted are 4 a frozen weight and token (forward, gradient of the input) and 6 a trained one (gradient of the weight besides), of the head
only at supervised tokens. Attention scores, and what gradient checkpointing computes twice, do not count.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from training.packing import Pack

PRODUCT_ROWS = 600  # about the tokens of one pack of the demo
PRODUCT_REPEATS = 10


@dataclass(frozen=True)
class OperationCount:
    """Operations of one forward and backward pass of a whole model."""

    per_token: int
    per_supervised_token: int
    widest: tuple[int, int]
    """(out, in) of the largest layer."""

    def of(self, packs: Sequence[Pack]) -> int:
        """Operations for these packs."""
        return sum(pack.ids.numel() * self.per_token + pack.num_supervised * self.per_supervised_token for pack in packs)


def count_operations(causal_model: Any) -> OperationCount:
    """The count of a model as `prepare_model` gives it."""
    head = causal_model.get_output_embeddings()
    per_token, shapes = 0, []
    for module in causal_model.modules():
        if hasattr(module, "lora_A"):
            shapes.append((len(module.lora_B), module.lora_A.shape[1]))
            per_token += 4 * math.prod(shapes[-1]) + 6 * (module.lora_A.numel() + module.lora_B.numel())
        elif module is not head and hasattr(module, "out_features"):
            shapes.append((module.out_features, module.in_features))
            per_token += (6 if module.weight.requires_grad else 4) * math.prod(shapes[-1])
    per_supervised = (6 if head.weight.requires_grad else 4) * head.weight.numel()
    return OperationCount(per_token, per_supervised, max(shapes, key=math.prod))


def peak_operations_per_s(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> float:
    """Operations a second of a plain product with a weight of that (out, in), the best of several."""
    weight, x = torch.randn(shape, device=device).to(dtype), torch.randn(PRODUCT_ROWS, shape[1], device=device).to(dtype)
    best = math.inf
    for _ in range(PRODUCT_REPEATS):
        started = time.perf_counter()
        nn.functional.linear(x, weight)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2 * PRODUCT_ROWS * math.prod(shape) / best
