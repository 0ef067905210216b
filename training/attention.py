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


class _Move(torch.autograd.Function):  # type: ignore[misc]
    """x (heads, n, dim) -> (heads, places, dim), some token where a place is -1; the gradient moves back by the inverse places.

    Nobody looks there: padding comes after its row's tokens, and what padding itself sees is dropped. So only gradients need zeros.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor, inverse: Tensor) -> Tensor:
        """The tokens at `places`."""
        ctx.save_for_backward(inverse)
        return x.index_select(1, places.clamp(min=0))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradient of x."""
        return take_places(gradients[0], ctx.saved_tensors[0]), None, None


def packed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *, packing: Pack, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """query (1, H, T, D), key and value (1, K, T, D) -> (1, T, H, D); the interface of transformers' attention functions."""
    prefix = packing.prefix_tokens
    q, k, v = query[0] * scaling, key[0], value[0]
    out = _rows_attend(q, k, v, packing)
    if prefix:
        first = _attend(_grouped(q[:, :prefix], len(k), 1), [(k[:, None, :prefix], v[:, None, :prefix])])
        out = torch.cat([first.view(len(q), prefix, -1), out[:, prefix:]], dim=1)
    return out.transpose(0, 1).unsqueeze(0), None


def _rows_attend(q: Tensor, k: Tensor, v: Tensor, packing: Pack) -> Tensor:
    """Every row to the prefix and to itself; (H, T, D), of no meaning for the prefix's own tokens."""
    padded, packed, num_rows = packing.padded_places, packing.packed_places, packing.num_rows
    heads, kv_heads, dim = len(q), len(k), q.shape[-1]
    own_q, own_k, own_v = (_Move.apply(x, padded, packed) for x in (q, k, v))  # type: ignore[no-untyped-call]
    sources = [(x[:, None, : packing.prefix_tokens] for x in (k, v)), (x.view(kv_heads, num_rows, -1, dim) for x in (own_k, own_v))]
    out = _attend(_grouped(own_q, kv_heads, num_rows), [tuple(pair) for pair in sources[not packing.prefix_tokens :]])
    out = out.view(kv_heads, num_rows, heads // kv_heads, -1, dim).transpose(1, 2).reshape(heads, len(padded), dim)
    moved: Tensor = _Move.apply(out, packed, padded)  # type: ignore[no-untyped-call]
    return moved


def _grouped(q: Tensor, kv_heads: int, num_rows: int) -> Tensor:
    """(H, R * L, D) -> (K, R, H / K * L, D): the query heads that share a key head become further queries of it."""
    heads, tokens, dim = q.shape
    split = q.view(kv_heads, heads // kv_heads, num_rows, tokens // num_rows, dim)
    return split.transpose(1, 2).reshape(kv_heads, num_rows, -1, dim)


def _attend(q: Tensor, sources: list[tuple[Tensor, ...]]) -> Tensor:
    """q (K, R, groups * L, D) over keys and values (K, 1 or R, S, D) of each source, the last one causal -> (K, R, groups * L, D).

    The softmax runs over all sources at once, in fp32.
    """
    scores = [_product(q, keys.transpose(-1, -2)) for keys, _ in sources]
    length = scores[-1].shape[-1]
    future = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1).repeat(q.shape[2] // length, 1)
    scores[-1] = scores[-1].masked_fill(future, float("-inf"))
    weights = torch.softmax(torch.cat(scores, dim=-1), dim=-1, dtype=torch.float32).to(q.dtype)
    parts = weights.split([part.shape[-1] for part in scores], dim=-1)
    out = _product(parts[0], sources[0][1])
    for part, (_, values) in zip(parts[1:], sources[1:], strict=True):
        out = out + _product(part, values)
    return out


def _product(left: Tensor, right: Tensor) -> Tensor:
    """(K, R, N, X) times (K, 1 or R, X, M); a right side shared by all rows is multiplied once, without copies."""
    if right.shape[1] == left.shape[1]:
        return left @ right
    kv_heads, num_rows, queries, _ = left.shape
    return (left.reshape(kv_heads, num_rows * queries, -1) @ right[:, 0]).view(kv_heads, num_rows, queries, -1)


def take_places(x: Tensor, places: Tensor) -> Tensor:
    """x (heads, n, dim) at `places`, zero where a place is -1."""
    absent = places < 0
    taken = x.index_select(1, places.clamp(min=0))
    return taken.masked_fill_(absent[:, None], 0.0)
