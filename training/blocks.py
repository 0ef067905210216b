"""The two halves of a decoder layer as packs want them: layers that share their input in one product, and few passes over activations.

The modules stay those of transformers, with their names, hooks and weights; only their forward is ours.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from training.attention import PackView, attend
from training.lora import joint_product, stack

ATTENTION_INPUTS = ("q_proj", "k_proj", "v_proj")
GATED_INPUTS = ("gate_proj", "up_proj")


def replace_forwards(model: Any) -> None:
    """Gives every decoder layer of a model the forwards of this module."""
    for layer in model.model.layers:
        attention, gated = layer.self_attn, layer.mlp
        attention.forward = partial(attention_forward, attention, attention.forward)
        if isinstance(gated.act_fn, nn.SiLU) or type(gated.act_fn).__name__ == "SiLUActivation":
            gated.forward = partial(gated_forward, gated)


def stack_weights(model: Any) -> None:
    """Lays the plain weights of layers that share their input one below the other."""
    for layer in model.model.layers:
        stack([getattr(layer.self_attn, name) for name in ATTENTION_INPUTS])
        stack([getattr(layer.mlp, name) for name in GATED_INPUTS])


def attention_forward(
    module: Any, plain: Any, hidden_states: Tensor, packing: PackView | None = None, **given: Any
) -> tuple[Tensor, Tensor | None]:
    """hidden_states (1, T, H) -> the same; without `packing` it is `plain`, the module's own forward."""
    if packing is None:
        result: tuple[Tensor, Tensor | None] = plain(hidden_states=hidden_states, **given)
        return result
    x = joint_product(hidden_states[0], [getattr(module, name) for name in ATTENTION_INPUTS])
    count, dim = x.shape[1] // module.head_dim, module.head_dim
    kv_heads = count // (module.num_key_value_groups + 2)
    heads = count - 2 * kv_heads
    if hasattr(module, "q_norm"):
        q, k, v = x.view(len(x), count, dim).split([heads, kv_heads, kv_heads], dim=1)
        x = torch.cat([module.q_norm(q), module.k_norm(k), v], dim=1).view(len(x), -1)
    return module.o_proj(attend(x, heads, kv_heads, packing, module.scaling)[None]), None


def gated_forward(module: Any, x: Tensor) -> Tensor:
    """x (..., H) -> (..., H): down(silu(gate x) * up x)."""
    both = joint_product(x.reshape(-1, x.shape[-1]), [getattr(module, name) for name in GATED_INPUTS])
    product: Tensor = GatedProduct.apply(both)  # type: ignore[no-untyped-call]
    out: Tensor = module.down_proj(product.view(*x.shape[:-1], -1))
    return out


class GatedProduct(torch.autograd.Function):  # type: ignore[misc]
    """(tokens, 2 I), gate and up side by side -> silu(gate) * up, (tokens, I). Source: Shazeer 2020, arXiv 2002.05202."""

    @staticmethod
    def forward(ctx: Any, both: Tensor) -> Tensor:
        """The product."""
        gate, up = both.chunk(2, dim=-1)
        opened = nn.functional.silu(gate)
        ctx.save_for_backward(both, opened)
        return opened * up

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor]:
        """Gradient of both."""
        both, opened = ctx.saved_tensors
        gate, up = both.chunk(2, dim=-1)
        dboth = torch.empty_like(both)
        dgate, dup = dboth.chunk(2, dim=-1)
        torch.mul(gradients[0], opened, out=dup)
        torch.ops.aten.silu_backward.grad_input(gradients[0] * up, gate, grad_input=dgate)
        return (dboth,)
