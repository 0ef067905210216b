"""Low-rank adapters: y = x W^T + scale (x A^T) B^T, with W frozen and perhaps quantized; with DoRA each output is rescaled besides.

- One hand-written gradient keeps x and x A^T only, and adds the low-rank part inside the matrix product. It serves one layer, or several
  that share their input as one product with their weights one below the other.
- Names and shapes on disk are those of PEFT.
- Sources: Hu et al. 2021, arXiv 2106.09685; Liu et al. 2024, arXiv 2402.09353 (DoRA); peft `tuners/lora/layer.py`, `tuners/lora/dora.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from infra.contracts import AdapterFacts
from infra.errors import ArtifactError
from training.adapter import PEFT_PREFIX, check_targets
from training.parameters import local
from training.quantized import QuantizedLinear, dense


class LoraProduct(torch.autograd.Function):  # type: ignore[misc]
    """x (tokens, in) through layers with A (rank, in) and B (out, rank) each -> (tokens, sum of out); no gradient for their weights.

    `dropped` is what A sees in the place of x where there is dropout. A quantized W is made dense twice, and not kept in between.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, dropped: Tensor | None, layers: Sequence[LoraLinear], bias: Tensor | None, *factors: Tensor) -> Tensor:
        """The adapted product; `factors` are A and B of each layer in turn."""
        seen = x if dropped is None else dropped
        a = factors[0] if len(layers) == 1 else torch.cat(factors[0::2])
        low = (seen @ a.t()).mul_(layers[0].scale)
        y = nn.functional.linear(x, stacked_weights(layers, x.dtype), bias)
        # layer by layer: one product with all B on a diagonal was slower, since its zeros are multiplied too
        for part, low_part, b in zip(*_by_layer(layers, y, low), factors[1::2], strict=True):
            part.addmm_(low_part, b.t())
        ctx.save_for_backward(seen, low, a, *factors[1::2])
        ctx.layers, ctx.has_dropout = layers, dropped is not None
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, of its dropped-out copy, and of each A and B."""
        seen, low, a, *bs = ctx.saved_tensors
        dy, layers = gradients[0], ctx.layers
        dlow, dbs = torch.empty_like(low), []
        for dy_part, low_part, dlow_part, b in zip(*_by_layer(layers, dy, low), _by_layer(layers, dy, dlow)[1], bs, strict=True):
            torch.mm(dy_part, b, out=dlow_part)
            dbs.append(dy_part.t() @ low_part)
        dlow.mul_(layers[0].scale)
        dx = ddropped = None
        if ctx.needs_input_grad[0]:
            dx = dy @ stacked_weights(layers, dy.dtype)
            if not ctx.has_dropout:
                dx.addmm_(dlow, a)
        if ctx.has_dropout and ctx.needs_input_grad[1]:
            ddropped = dlow @ a
        das = (dlow.t() @ seen).split([layer.factor_sizes[0] for layer in layers])
        return dx, ddropped, None, None, *(factor for pair in zip(das, dbs, strict=True) for factor in pair)


def _by_layer(layers: Sequence[LoraLinear], y: Tensor, low: Tensor) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Each layer's columns of what is as wide as the outputs and of what is as wide as the ranks."""
    ranks, widths = zip(*(layer.factor_sizes for layer in layers), strict=True)
    return y.split(widths, dim=1), low.split(ranks, dim=1)


class LoraLinear(nn.Module):  # type: ignore[misc]
    """A frozen linear layer with an adapter."""

    def __init__(self, linear: nn.Linear | QuantizedLinear, facts: AdapterFacts, dropout: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.scale, self.dropout = facts.scale, dropout
        self.lora_A = nn.Parameter(torch.zeros(facts.rank, linear.in_features, dtype=dtype))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, facts.rank, dtype=dtype))
        self.lora_magnitude_vector = None
        if facts.use_dora:
            squares = dense(self.weight, dtype).float().square().sum(dim=1)
            self.register_buffer("base_squares", squares, persistent=False)
            self.lora_magnitude_vector = nn.Parameter(squares.sqrt().to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        return adapted_product(x.reshape(-1, x.shape[-1]), [self]).view(*x.shape[:-1], -1)

    @property
    def factor_sizes(self) -> tuple[int, int]:
        """Rank and outputs of the part that this worker holds."""
        return len(local(self.lora_A)), len(local(self.lora_B))

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def row_norms(self) -> Tensor:
        """Norm of each row of W + scale B A, (out); a constant of the gradient, as DoRA's section 4.3 has it.

        |w + s b A|^2 = |w|^2 + 2 s (w A^T) b + s^2 b (A A^T) b, so that the sum itself is never formed.
        """
        a, b = self.lora_A, self.lora_B.float()
        crossed = (dense(self.weight, a.dtype) @ a.t()).float()
        wide = a.float()
        squares = self.base_squares + (2 * self.scale * crossed * b + self.scale**2 * (b @ (wide @ wide.t())) * b).sum(dim=1)
        return squares.clamp(min=0).sqrt().to(a.dtype)


def adapted_product(x: Tensor, layers: Sequence[LoraLinear]) -> Tensor:
    """x (tokens, in) through layers of one adapter, their outputs side by side; dropout is drawn once for all."""
    first = layers[0]
    dropped = nn.functional.dropout(x, first.dropout) if first.dropout and first.training else None
    bias = _stacked_biases(layers, x)
    factors = [local(factor) for layer in layers for factor in (layer.lora_A, layer.lora_B)]
    is_scaled = first.lora_magnitude_vector is not None
    y: Tensor = LoraProduct.apply(x, dropped, layers, None if is_scaled else bias, *factors)  # type: ignore[no-untyped-call]
    if is_scaled:
        y = y * torch.cat([layer.lora_magnitude_vector / layer.row_norms() for layer in layers])
        y = y if bias is None else y + bias
    return y


def joint_product(x: Tensor, layers: Sequence[nn.Module]) -> Tensor:
    """x (tokens, in) through linear layers of any kind, their outputs side by side; one product where all have adapters."""
    if all(isinstance(layer, LoraLinear) for layer in layers):
        return adapted_product(x, layers)  # type: ignore[arg-type]
    return torch.cat([layer(x) for layer in layers], dim=-1)


def stacked_weights(layers: Sequence[LoraLinear], dtype: torch.dtype) -> Tensor:
    """The layers' weights one below the other, (sum of out, in): without a copy where they lie so in memory, see `stack`."""
    weights = [dense(local(layer.weight), dtype) for layer in layers]
    first, ends = weights[0], [weight.data_ptr() + weight.nbytes for weight in weights]
    if len(weights) == 1:
        return first
    is_stacked = all(weight.data_ptr() == end for weight, end in zip(weights[1:], ends, strict=False))
    if is_stacked and len({weight.untyped_storage().data_ptr() for weight in weights}) == 1:
        return first.as_strided((sum(len(weight) for weight in weights), first.shape[1]), first.stride())
    return torch.cat(weights)


def stack(layers: Sequence[nn.Module]) -> None:
    """Puts the plain weights of layers that share their input one below the other in memory."""
    weights = [layer.weight for layer in layers]
    joined = torch.cat([weight.data for weight in weights])
    for weight, part in zip(weights, joined.split([len(weight) for weight in weights]), strict=True):
        weight.data = part


def _stacked_biases(layers: Sequence[LoraLinear], x: Tensor) -> Tensor | None:
    biases = [None if layer.bias is None else local(layer.bias) for layer in layers]
    if all(bias is None for bias in biases):
        return None
    widths = [layer.factor_sizes[1] for layer in layers]
    return torch.cat([x.new_zeros(width) if bias is None else bias for bias, width in zip(biases, widths, strict=True)])


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
