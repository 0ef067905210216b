"""Attention over a pack: each row to the shared prefix and to itself, with rotary positions, in plain matrix products.

- Queries, keys and values are taken straight from their joint product into padded rows, head by head, and gradients go straight back.
- At these lengths (under a hundred tokens) plain products were faster than the fused kernel of torch on a CPU, whose backward was the
  second largest cost of a step. The score matrix is quadratic in the row's length: on a GPU torch's FlexAttention does the same without.
- H heads, K key heads, G = H / K, n = H + 2 K, D per head; T tokens, R rows, L the longest without the prefix, P prefix tokens, M = P + L.
- Sources: Su et al. 2021, arXiv 2104.09864 (rotary positions); Dong et al. 2024, arXiv 2412.05496 (FlexAttention).
"""

from __future__ import annotations

from functools import cache, cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from training.packing import PREFIX_ROW, Pack


class Places:
    """Where the heads of a pack's tokens lie: rows of (T n, D) and back; the same for all layers with as many heads."""

    def __init__(self, pack: Pack, heads: int, kv_heads: int, dtype: torch.dtype) -> None:
        self.heads, self.kv_heads, self.groups = heads, kv_heads, heads // kv_heads
        self.rows, self.longest, self.prefix = pack.num_rows, len(pack.padded_places) // pack.num_rows, pack.prefix_tokens
        device = pack.ids.device
        count, first = heads + 2 * kv_heads, torch.arange(self.prefix, device=device)
        absent = pack.ids.shape[1] - 1  # the last token is a filler, whose gradient is zero
        own = pack.padded_places.view(self.rows, self.longest)
        own = torch.where(own < 0, absent, own)
        head, kv_head = torch.arange(heads, device=device), torch.arange(kv_heads, device=device)
        by_head = head.view(kv_heads, 1, self.groups, 1)
        self.queries = (own[:, None] * count + by_head).flatten()
        """(K R G L)"""
        seen = torch.cat([first.expand(self.rows, -1), own], dim=1)
        self.keys = (seen * count + heads + kv_head[:, None, None]).flatten()
        """(K R M); values come `kv_heads` later"""
        self.queries_alone = (own[:, None] * heads + by_head).flatten()
        """(K R G L), where a token has its query heads only"""
        place = pack.packed_places[:, None]
        row, column = place // self.longest, place % self.longest
        at_query = ((kv_head * self.rows + row)[..., None] * self.groups + torch.arange(self.groups, device=device)) * self.longest
        at_query = (at_query + column[..., None]).flatten(1)
        at_key = (kv_head * self.rows + row) * (self.prefix + self.longest) + self.prefix + column
        num_queries, num_keys, num_first = len(self.queries), len(self.keys), self.prefix * heads
        first_query = num_queries + head * self.prefix + first[:, None]
        self.answers = at_query.clamp(min=0)
        """(T, H): rows of the padded answers, then of the prefix's"""
        self.answers[: self.prefix] = first_query
        first_key = num_queries + 2 * num_keys + num_first + kv_head * self.prefix + first[:, None]
        self.num_gradients = num_queries + 2 * num_keys + num_first + 2 * kv_heads * self.prefix
        self.gradients = torch.cat([at_query, num_queries + at_key, num_queries + num_keys + at_key], dim=1)
        """(T, n): rows of the gradients of q, k, v and of the prefix's q, k, v, then one of zeros, for filler"""
        self.gradients[place[:, 0] < 0] = self.num_gradients
        in_prefix = [first_query + 2 * num_keys, first_key, first_key + kv_heads * self.prefix]
        self.gradients[: self.prefix] = torch.cat(in_prefix, dim=1)
        self.mask = _future(self.longest, self.prefix, self.groups, dtype, device)
        self.first_mask = _future(self.prefix, 0, self.groups, dtype, device)


def _future(length: int, before: int, groups: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What is added to scores (groups * length, before + length): minus infinity where the key comes after the query."""
    hidden = torch.ones(length, before + length, dtype=torch.bool, device=device).triu(before + 1)
    return torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, float("-inf")).repeat(groups, 1)


class PackView:
    """A pack as attention sees it, for all layers of one pass; cos and sin (M, D) are those of the positions 0 to M - 1."""

    def __init__(self, pack: Pack, cos: Tensor, sin: Tensor) -> None:
        self.pack, self.cos = pack, cos
        half = sin.shape[-1] // 2
        self.sin = torch.cat([-sin[:, :half], sin[:, half:]], dim=-1)  # x cos + swapped(x) sin is the rotation
        self.places = cache(partial(Places, pack, dtype=cos.dtype))

    @cached_property
    def block_mask(self) -> BlockMask:
        """Each token to what comes before it of the prefix and of its own row."""
        rows, positions = self.pack.token_rows, self.pack.positions[0]

        def is_seen(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return ((rows[key] == PREFIX_ROW) | (rows[key] == rows[query])) & (positions[key] <= positions[query])

        return create_block_mask(is_seen, None, None, len(rows), len(rows), device=str(rows.device))


def num_positions(pack: Pack) -> int:
    """M: positions that a pack needs."""
    return pack.prefix_tokens + len(pack.padded_places) // pack.num_rows


def attend(x: Tensor, heads: int, kv_heads: int, view: PackView, scaling: float) -> Tensor:
    """x (T, n D), every token's queries, keys and values without positions -> (T, H D)."""
    if x.is_cuda:
        return flex_attend(x, heads, kv_heads, view, scaling, _compiled_flex())
    out: Tensor = PackedAttention.apply(x, view.cos, view.sin, view.places(heads, kv_heads), scaling)  # type: ignore[no-untyped-call]
    return out


class PackedAttention(torch.autograd.Function):  # type: ignore[misc]
    """x (T, n D) -> (T, H D). With weights W = softmax(S): dV = W^T dO, dS = W (dO V^T - sum(dO V^T W)), dQ = dS K, dK = dS^T Q.

    The softmax runs in fp32; rotations are undone in the gradients of queries and keys.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, places: Places, scaling: float) -> Tensor:
        """The attention."""
        dim, prefix = cos.shape[1], places.prefix
        q, k, v = _taken(x.view(-1, dim), places)
        rotate_(q.view(-1, places.longest, dim), cos[prefix:], sin[prefix:])
        rotate_(k, cos, sin)
        answers = x.new_empty(len(q) * q.shape[1] + places.heads * prefix, dim)
        own, first = answers.tensor_split([len(q) * q.shape[1]])
        weights = _weights(q, k, places.mask, scaling)
        torch.bmm(weights, v, out=own.view(q.shape))
        ctx.save_for_backward(q, k, v, weights, *_first_attend(x, cos, sin, k, v, places, scaling, first))
        ctx.tables, ctx.places, ctx.scaling = (cos, sin), places, scaling
        return answers.index_select(0, places.answers.flatten()).view(len(x), -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradient of x."""
        q, k, v, weights, *first = ctx.saved_tensors
        (cos, sin), places, dim, prefix = ctx.tables, ctx.places, q.shape[-1], ctx.places.prefix
        dout = gradients[0].contiguous().view(-1, dim)
        buffer = dout.new_empty(places.num_gradients + 1, dim)
        buffer[-1] = 0
        sizes = [q.numel() // dim, k.numel() // dim, v.numel() // dim]
        dq, dk, dv = (
            part.view(like.shape) for part, like in zip(buffer.split([*sizes, len(buffer) - sum(sizes)]), (q, k, v), strict=False)
        )
        _attend_backward(dout.index_select(0, places.queries_alone).view(q.shape), q, k, v, weights, ctx.scaling, (dq, dk, dv))
        if prefix:
            rest = buffer[sum(sizes) : -1].split([places.heads * prefix, places.kv_heads * prefix, places.kv_heads * prefix])
            q0, k0, v0, weights0 = first
            made = [part.view(like.shape) for part, like in zip(rest, (q0, k0, v0), strict=True)]
            dout0 = dout.view(-1, places.heads, dim)[:prefix].transpose(0, 1).reshape(q0.shape)
            _attend_backward(dout0, q0, k0, v0, weights0, ctx.scaling, made)
            for total, part in zip(made[1:], (dk, dv), strict=True):
                total += part.view(places.kv_heads, places.rows, -1, dim)[:, :, :prefix].sum(1)
            rotate_(made[0].view(-1, prefix, dim), cos[:prefix], -sin[:prefix])
            rotate_(made[1], cos[:prefix], -sin[:prefix])
        rotate_(dq.view(-1, places.longest, dim), cos[prefix:], -sin[prefix:])
        rotate_(dk, cos, -sin)
        return buffer.index_select(0, places.gradients.flatten()).view(len(gradients[0]), -1), None, None, None, None


def _taken(flat: Tensor, places: Places) -> tuple[Tensor, Tensor, Tensor]:
    """q (K R, G L, D), k and v (K R, M, D) of the padded rows."""
    batch = places.kv_heads * places.rows
    q = flat.index_select(0, places.queries).view(batch, places.groups * places.longest, -1)
    k, v = (flat.index_select(0, places.keys + shift).view(batch, places.prefix + places.longest, -1) for shift in (0, places.kv_heads))
    return q, k, v


def _first_attend(
    x: Tensor, cos: Tensor, sin: Tensor, k: Tensor, v: Tensor, places: Places, scaling: float, out: Tensor
) -> tuple[Tensor, ...]:
    """The prefix to itself, into `out` (H P, D): its q (K, G P, D), k and v (K, P, D) and weights; nothing where there is no prefix."""
    prefix, dim = places.prefix, cos.shape[1]
    if not prefix:
        return ()
    q = x.view(len(x), -1, dim)[:prefix, : places.heads].transpose(0, 1).contiguous()
    rotate_(q, cos[:prefix], sin[:prefix])
    q = q.view(places.kv_heads, -1, dim)
    k, v = (part.view(places.kv_heads, places.rows, -1, dim)[:, 0, :prefix].contiguous() for part in (k, v))
    weights = _weights(q, k, places.first_mask, scaling)
    torch.bmm(weights, v, out=out.view(q.shape))
    return q, k, v, weights


def _weights(q: Tensor, k: Tensor, mask: Tensor, scaling: float) -> Tensor:
    scores = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=scaling)
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)  # three times as fast as the kernel that stays in bf16


def _attend_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, weights: Tensor, scaling: float, into: Any) -> None:
    """Writes the gradients of q, k and v."""
    dq, dk, dv = into
    dweights = torch.bmm(dout, v.transpose(1, 2))
    dscores = torch._softmax_backward_data(dweights, weights, -1, weights.dtype)
    torch.baddbmm(dq, dscores, k, beta=0, alpha=scaling, out=dq)
    torch.baddbmm(dk, dscores.transpose(1, 2), q, beta=0, alpha=scaling, out=dk)
    torch.bmm(weights.transpose(1, 2), dout, out=dv)


def rotate_(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (..., places, D), turned in place by the angles of cos and signed sin (places, D); with -sin it is turned back."""
    half = x.shape[-1] // 2
    swapped = torch.cat([x[..., half:], x[..., :half]], dim=-1)
    return x.mul_(cos).addcmul_(swapped, sin)


def flex_attend(x: Tensor, heads: int, kv_heads: int, view: PackView, scaling: float, flex: Any = flex_attention) -> Tensor:
    """`attend` by FlexAttention, which holds no score matrix; `flex` may be compiled."""
    pack, dim = view.pack, view.cos.shape[1]
    parts = x.view(1, len(x), -1, dim).transpose(1, 2).split([heads, kv_heads, kv_heads], dim=1)
    cos, sin = (table[pack.positions[0]] for table in (view.cos, view.sin))
    q, k = (rotate_(part.clone(), cos, sin) for part in parts[:2])
    out: Tensor = flex(q, k, parts[2].contiguous(), block_mask=view.block_mask, scale=scaling, enable_gqa=heads != kv_heads)
    return out[0].transpose(0, 1).reshape(len(x), -1)


@cache
def _compiled_flex() -> Any:
    return torch.compile(flex_attention, dynamic=True)
