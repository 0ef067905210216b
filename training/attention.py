"""Attention over a pack: each row to the shared prefix and to itself, in plain matrix products.

At these lengths (under a hundred tokens) plain products were faster than the fused kernel of torch on a CPU, whose backward was the
second largest cost of a step. The score matrix is quadratic in the row's length, so long rows will want another kernel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from training.packing import Pack

NAME = "slipway_packed"


class _Gather(torch.autograd.Function):
    """x (heads, tokens, dim) -> (heads, places, dim); its gradient is a gather by the inverse places, not a scattered addition."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor, inverse: Tensor, offset: int) -> Tensor:
        """Tokens at `places`; those before `offset` are in no place."""
        ctx.save_for_backward(inverse)
        ctx.offset = offset
        return x.index_select(1, places)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradient of x; padding, which repeats a token, has none because nothing reads its output."""
        (inverse,) = ctx.saved_tensors
        dx = gradients[0].index_select(1, inverse)
        return nn.functional.pad(dx, (0, 0, ctx.offset, 0)), None, None, None


def packed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *, packing: Pack, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """query (1, H, T, D), key and value (1, K, T, D) -> (1, T, H, D); the interface of transformers' attention functions."""
    prefix = packing.prefix_tokens
    q, k, v = query[0] * scaling, key[0], value[0]
    rows = _rows_attend(q, k, v, packing)
    if prefix == 0:
        return rows.transpose(0, 1).unsqueeze(0), None
    first = _attend(_grouped(q[:, :prefix], len(k)), [(k[:, :prefix], v[:, :prefix], True)]).reshape(len(q), prefix, -1)
    return torch.cat([first, rows], dim=1).transpose(0, 1).unsqueeze(0), None


def _rows_attend(q: Tensor, k: Tensor, v: Tensor, packing: Pack) -> Tensor:
    """Every row to prefix and itself; (H, T - prefix, D)."""
    prefix, num_rows = packing.prefix_tokens, packing.num_rows
    heads, kv_heads, dim = len(q), len(k), q.shape[-1]
    places, inverse = packing.padded_places, packing.packed_places
    q, own_k, own_v = (_Gather.apply(x, places, inverse, prefix) for x in (q, k, v))  # type: ignore[no-untyped-call]
    length = len(places) // num_rows
    # (K, groups, R, L, D) -> (K, R, groups * L, D): the query heads of one key head are further queries of it
    q = q.view(kv_heads, -1, num_rows, length, dim).transpose(1, 2).reshape(kv_heads, num_rows, -1, dim)
    own = (own_k.view(kv_heads, num_rows, length, dim), own_v.view(kv_heads, num_rows, length, dim), True)
    shared = (k[:, None, :prefix], v[:, None, :prefix], False)
    out = _attend(q, [shared, own] if prefix else [own])
    out = out.view(kv_heads, num_rows, -1, length, dim).transpose(1, 2).reshape(heads, num_rows * length, dim)
    taken: Tensor = _Gather.apply(out, inverse, _inverse_of_padding(packing), 0)  # type: ignore[no-untyped-call]
    return taken
