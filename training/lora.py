"""Low-rank adapters: y = x W^T + scale (x A^T) B^T, with W frozen and perhaps quantized; with DoRA each output is rescaled besides.

- One hand-written gradient a layer keeps x and x A^T only, and adds the low-rank part inside the matrix product.
- Names and shapes on disk are those of PEFT.
- Sources: Hu et al. 2021, arXiv 2106.09685; Liu et al. 2024, arXiv 2402.09353 (DoRA); peft `tuners/lora/layer.py`, `tuners/lora/dora.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from infra.contracts import AdapterFacts
from infra.errors import ArtifactError
from training.adapter import PEFT_PREFIX, adapter_scale, check_targets
from training.parameters import local
from training.quantized import QuantizedLinear, dense


class LoraProduct(torch.autograd.Function):  # type: ignore[misc]
    """x (tokens, in), W (out, in), A (rank, in), B (out, rank) -> (tokens, out); no gradient for W.

    `dropped` is what A sees in the place of x where there is dropout. A quantized W is made dense twice, and not kept in between.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dropped: Tensor | None, weight: Any, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
    ) -> Tensor:
        """The adapted product."""
        seen = x if dropped is None else dropped
        low = seen @ a.t()
        y = nn.functional.linear(x, dense(weight, x.dtype), bias)
        y.addmm_(low, b.t(), alpha=scale)
        ctx.save_for_backward(seen, low, a, b)
        ctx.weight, ctx.scale, ctx.has_dropout = weight, scale, dropped is not None
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, of its dropped-out copy, A and B."""
        seen, low, a, b = ctx.saved_tensors
        dy = gradients[0]
        dlow = (dy @ b).mul_(ctx.scale)
        dx = ddropped = None
        if ctx.needs_input_grad[0]:
            dx = dy @ dense(ctx.weight, dy.dtype)
            if not ctx.has_dropout:
                dx.addmm_(dlow, a)
        if ctx.has_dropout and ctx.needs_input_grad[1]:
            ddropped = dlow @ a
        return dx, ddropped, None, None, dlow.t() @ seen, (dy.t() @ low).mul_(ctx.scale), None


class LoraLinear(nn.Module):  # type: ignore[misc]
    """A frozen linear layer with an adapter."""

    def __init__(self, linear: nn.Linear | QuantizedLinear, facts: AdapterFacts, dropout: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.scale, self.dropout = adapter_scale(facts), dropout
        self.lora_A = nn.Parameter(torch.zeros(facts.rank, linear.in_features, dtype=dtype))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, facts.rank, dtype=dtype))
        self.lora_magnitude_vector = None
        if facts.use_dora:
            squares = dense(self.weight, dtype).float().square().sum(dim=1)
            self.register_buffer("base_squares", squares, persistent=False)
            self.lora_magnitude_vector = nn.Parameter(squares.sqrt().to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        flat = x.reshape(-1, x.shape[-1])
        dropped = nn.functional.dropout(flat, self.dropout) if self.dropout and self.training else None
        bias = None if self.lora_magnitude_vector is not None else self.bias
        weight, a, b = local(self.weight), local(self.lora_A), local(self.lora_B)
        y: Tensor = LoraProduct.apply(flat, dropped, weight, bias, a, b, self.scale)  # type: ignore[no-untyped-call]
        if self.lora_magnitude_vector is not None:
            y = y * (self.lora_magnitude_vector / self._row_norms())
            y = y if self.bias is None else y + self.bias
        return y.view(*x.shape[:-1], -1)

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def _row_norms(self) -> Tensor:
        """Norm of each row of W + scale B A, (out); a constant of the gradient, as DoRA's section 4.3 has it.

        |w + s b A|^2 = |w|^2 + 2 s (w A^T) b + s^2 b (A A^T) b, so that the sum itself is never formed.
        """
        a, b = self.lora_A, self.lora_B.float()
        crossed = (dense(self.weight, a.dtype) @ a.t()).float()
        wide = a.float()
        squares = self.base_squares + (2 * self.scale * crossed * b + self.scale**2 * (b @ (wide @ wide.t())) * b).sum(dim=1)
        return squares.clamp(min=0).sqrt().to(a.dtype)


def peft_name(parameter: str) -> str:
    """`model.layers.0.mlp.up_proj.lora_A` as PEFT writes it."""
    return f"{PEFT_PREFIX}{parameter}" + ("" if parameter.endswith("lora_magnitude_vector") else ".weight")


def attach(model: nn.Module, facts: AdapterFacts, dropout: float, dtype: torch.dtype) -> None:
    """Freezes `model` and puts a zero adapter on each target layer. Raises ConfigError for a target that does not exist."""
    kinds = (nn.Linear, QuantizedLinear)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, kinds) and name != "lm_head"}
    wanted = set(facts.target_modules)
    check_targets(wanted, linears)
    model.requires_grad_(False)
    for name, linear in linears.items():
        parent, _, child = name.rpartition(".")
        if child in wanted:
            setattr(model.get_submodule(parent), child, LoraLinear(linear, facts, dropout, dtype))


def initialize(model: nn.Module, seed: int) -> None:
    """A as PEFT draws it (Kaiming uniform, in module order), B zero, so that training starts from the base model."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, LoraLinear):
            drawn = torch.empty(module.lora_A.shape, dtype=torch.float32)
            nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
            module.lora_A.data.copy_(drawn)
            module.lora_B.data.zero_()


def load_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Fills the adapters of `model`. Raises ArtifactError where a tensor is missing, left over or of another shape."""
    own = {peft_name(name): parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    different = sorted(set(own) ^ set(tensors))
    if different or any(own[name].shape != tensors[name].shape for name in own):
        problem = different[:3] or "shapes differ"
        raise ArtifactError(f"the adapter's tensors do not fit this model ({problem}). Train it again on this base.")
    for name, parameter in own.items():
        parameter.data.copy_(tensors[name])
