"""Low-rank adapters: y = x W^T + scale (x A^T) B^T, with W frozen.

- One hand-written gradient a layer keeps x and x A^T only, and adds the low-rank part inside the matrix product.
- All A and B are views of one flat tensor, so that norm, optimizer and all-reduce are each one call.
- Names and shapes on disk are those of PEFT. Source: Hu et al. 2021, arXiv 2106.09685; peft `tuners/lora/layer.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from infra.errors import ArtifactError
from training.adapter import PEFT_PREFIX, check_targets


class LoraProduct(torch.autograd.Function):  # type: ignore[misc]
    """x (tokens, in), W (out, in), A (rank, in), B (out, rank) -> (tokens, out); no gradient for W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        """The adapted product."""
        low = x @ a.t()
        y = nn.functional.linear(x, weight, bias)
        y.addmm_(low, b.t(), alpha=scale)
        ctx.save_for_backward(x, low, weight, a, b)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, A and B."""
        x, low, weight, a, b = ctx.saved_tensors
        dy = gradients[0]
        dlow = (dy @ b).mul_(ctx.scale)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = dy @ weight
            dx.addmm_(dlow, a)
        return dx, None, None, dlow.t() @ x, (dy.t() @ low).mul_(ctx.scale), None


class LoraLinear(nn.Module):  # type: ignore[misc]
    """A frozen linear layer with an adapter."""

    def __init__(self, linear: nn.Linear, rank: int, scale: float, dropout: float) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.scale, self.dropout = scale, dropout
        self.lora_A = nn.Parameter(torch.zeros(rank, linear.in_features, dtype=linear.weight.dtype))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, rank, dtype=linear.weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        if self.dropout and self.training:
            low = nn.functional.dropout(x, self.dropout) @ self.lora_A.t()
            return nn.functional.linear(x, self.weight, self.bias) + (low @ self.lora_B.t()) * self.scale
        flat = x.reshape(-1, x.shape[-1])
        y: Tensor = LoraProduct.apply(flat, self.weight, self.bias, self.lora_A, self.lora_B, self.scale)  # type: ignore[no-untyped-call]
        return y.view(*x.shape[:-1], -1)


class AdapterParameters:
    """Every A and B as views of one flat tensor, with fp32 master values and fp32 gradients beside it."""

    def __init__(self, model: nn.Module) -> None:
        found = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.names = list(found)
        self.shapes = [parameter.shape for parameter in found.values()]
        self.compute = torch.cat([parameter.detach().flatten() for parameter in found.values()])
        self.compute_gradient = torch.zeros_like(self.compute)
        self.master = nn.Parameter(self.compute.float() if self.compute.dtype != torch.float32 else self.compute)
        self.master.grad = torch.zeros_like(self.master)
        for parameter, values, gradient in zip(found.values(), self.views(self.compute), self.views(self.compute_gradient), strict=True):
            parameter.data = values
            parameter.grad = gradient

    def views(self, flat: Tensor) -> list[Tensor]:
        """`flat` cut into the adapters' shapes, sharing its memory."""
        sizes = [shape.numel() for shape in self.shapes]
        return [piece.view(shape) for piece, shape in zip(flat.split(sizes), self.shapes, strict=True)]

    @property
    def gradient(self) -> Tensor:
        """The fp32 gradient collected so far, flat."""
        assert self.master.grad is not None
        return self.master.grad

    def collect_gradient(self) -> None:
        """Adds the gradient of one backward pass to the fp32 one and clears it."""
        self.gradient.add_(self.compute_gradient)
        self.compute_gradient.zero_()

    def publish(self) -> None:
        """Rounds the master values into the tensors that the model computes with."""
        if self.compute.dtype != torch.float32:
            self.compute.copy_(self.master.detach())

    def tensors(self) -> dict[str, Tensor]:
        """fp32 values by their PEFT names."""
        return {peft_name(name): view.clone() for name, view in zip(self.names, self.views(self.master.detach()), strict=True)}


def peft_name(parameter: str) -> str:
    """`model.layers.0.mlp.up_proj.lora_A` as PEFT writes it."""
    return f"{PEFT_PREFIX}{parameter}.weight"


def attach(model: nn.Module, rank: int, scale: float, dropout: float, targets: Iterable[str]) -> None:
    """Freezes `model` and puts a zero adapter on each target layer. Raises ConfigError for a target that does not exist."""
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"}
    wanted = set(targets)
    check_targets(wanted, linears)
    model.requires_grad_(False)
    for name, linear in linears.items():
        parent, _, child = name.rpartition(".")
        if child in wanted:
            setattr(model.get_submodule(parent), child, LoraLinear(linear, rank, scale, dropout))


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
