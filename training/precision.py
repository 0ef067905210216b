"""Which arithmetic this machine does well."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

FIRST_SCALE = 2.0**16
GROWTH_STEPS = 2000
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def compute_dtype(precision: Literal["auto", "bf16", "fp16", "fp32"]) -> torch.dtype:
    """The dtype of forward and backward; `auto` is bf16 only where the processor multiplies in bf16.

    Without those instructions a bf16 matrix product of these shapes took 230 ms, the same in fp32 24 ms (EPYC with AVX2 only).
    """
    if precision == "auto":
        return torch.bfloat16 if has_bf16_products() else torch.float32
    return DTYPES[precision]


def has_bf16_products() -> bool:
    """Whether the GPU, or else the processor, has matrix or dot-product instructions for bf16."""
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def precision_name(dtype: torch.dtype) -> str:
    """The config's word for a dtype."""
    return next(name for name, known in DTYPES.items() if known == dtype)


@dataclass
class LossScale:
    """The factor on the loss that keeps fp16 gradients from vanishing: halved where they overflow, doubled after many steps without.

    Such a step is left out. Source: Micikevicius et al. 2017, arXiv 1710.03740.
    """

    is_active: bool
    value: float = 1.0
    steps_since_change: int = 0

    def __post_init__(self) -> None:
        if self.is_active:
            self.value = FIRST_SCALE

    def accepts(self, gradient_norm: float) -> bool:
        """Whether the step counts; changes the scale for the next one. Without fp16, or with a scale of one, every step counts."""
        is_good = math.isfinite(gradient_norm)
        if not self.is_active or (not is_good and self.value <= 1):
            return True  # nothing left to scale down: the caller refuses what is not finite
        self.steps_since_change += 1
        if not is_good:
            self.value, self.steps_since_change = max(self.value / 2, 1.0), 0
        elif self.steps_since_change >= GROWTH_STEPS:
            self.value, self.steps_since_change = self.value * 2, 0
        return is_good

    def state(self) -> list[float]:
        """For a checkpoint: value and steps."""
        return [self.value, self.steps_since_change]

    def restore(self, state: Sequence[float]) -> None:
        """Puts back what `state` gave."""
        self.value, self.steps_since_change = state[0], int(state[1])
