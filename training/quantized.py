"""Frozen weights stored in four or eight bits by bitsandbytes, and made dense again for each product (QLoRA).

Only storage is quantized: products run in the compute dtype, and an adapter trained so is still merged into the 16-bit base.
Source: Dettmers et al. 2023, arXiv 2305.14314 (NF4, double quantization); Dettmers et al. 2022, arXiv 2208.07339 (rows of INT8).
"""

from __future__ import annotations

import logging
from typing import Any, Literal

import torch
from torch import Tensor, nn

Quantization = Literal["none", "nf4", "int8"]
INT8_LARGEST = 127.0


def load_options(quantization: Quantization, dtype: torch.dtype) -> dict[str, Any]:
    """What transformers must be told so that linear layers are quantized one by one while the model is loaded."""
    if quantization == "none":
        return {}
    from transformers import BitsAndBytesConfig

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it mentions an optional kernel package, which serves inference only
    if quantization == "int8":
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )  # fmt: skip
    return {"quantization_config": config}


def dense(weight: Any, dtype: torch.dtype) -> Tensor:
    """A frozen weight (out, in) in `dtype`; a weight that is not quantized comes back as it is."""
    if getattr(weight, "quant_state", None) is not None:
        from bitsandbytes.functional import dequantize_4bit

        values: Tensor = dequantize_4bit(weight.data, weight.quant_state)
        return values.to(dtype)
    if getattr(weight, "CB", None) is not None:
        rows: Tensor = weight.CB.to(dtype)
        return rows.mul_((weight.SCB / INT8_LARGEST).to(dtype)[:, None])
    return weight  # type: ignore[no-any-return]


class QuantizedLinear(nn.Module):  # type: ignore[misc]
    """A frozen layer without adapter on a quantized base: its weight made dense for each product, as for layers with one."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        y: Tensor = _DenseProduct.apply(x, self.weight, self.bias)  # type: ignore[no-untyped-call]
        return y


def replace_linears(model: nn.Module) -> None:
    """Puts a QuantizedLinear in the place of bitsandbytes' layers, whose own product rounds activations: to bf16, or to INT8."""
    for name in [name for name, module in model.named_modules() if type(module).__name__ in ("Linear4bit", "Linear8bitLt")]:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, QuantizedLinear(model.get_submodule(name)))


class _DenseProduct(torch.autograd.Function):  # type: ignore[misc]
    """x (..., in), stored weight (out, in), bias -> (..., out); no gradient for the weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
        """The product."""
        ctx.weight = weight
        return nn.functional.linear(x, dense(weight, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradient of x."""
        return gradients[0] @ dense(ctx.weight, gradients[0].dtype), None, None
