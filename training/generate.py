"""Greedy answers to many prompts at once.

- Prompts are read as one pack (see training/packing.py): no padding, their common beginning once, its keys and values shared by all rows.
- Each row writes its next key and value into its own place of a block that was reserved at the start, so nothing is copied a token.
- Rows that have ended leave the block once a quarter of it is idle.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from training.attention import PackView, attend, num_positions
from training.data.tokens import TokenRow
from training.packing import Pack, make_pack

NAME = "slipway_decode"
IDLE_SHARE = 0.25


class AnswerCache:
    """Keys and values of one batch of rows; K key heads, R rows, P prefix tokens, S places a row, D per head."""

    def __init__(self, pack: Pack, max_new_tokens: int, like: Tensor) -> None:
        turned = like.new_zeros(num_positions(pack), like.shape[-1])  # the model turns queries and keys by their positions itself
        self.view: PackView | None = PackView(pack, torch.ones_like(turned), turned)
        """The prompts, until they are read."""
        self.longest = len(pack.padded_places) // pack.num_rows
        """Longest prompt without the prefix."""
        self.prefix: list[tuple[Tensor, Tensor]] = []
        """Per layer (K, 1, P, D) twice."""
        self.own: list[tuple[Tensor, Tensor]] = []
        """Per layer (K, R, S, D) twice."""
        self.lengths = (pack.padded_places.view(pack.num_rows, -1) >= 0).sum(dim=1)
        self.places = self.longest + max_new_tokens

    def take(self, key: Tensor, value: Tensor, layer: int) -> None:
        """Takes in key and value (1, K, T, D) of one layer."""
        if self.view is not None:
            self._take_prompts(self.view.pack, key[0], value[0])
        else:
            rows = torch.arange(len(self.lengths), device=self.lengths.device)
            for block, new in zip(self.own[layer], (key[0], value[0]), strict=True):
                block[:, rows, self.lengths] = new

    def keep(self, rows: Tensor) -> None:
        """Drops all rows but these."""
        self.own = [(keys[:, rows], values[:, rows]) for keys, values in self.own]
        self.lengths = self.lengths[rows]

    def _take_prompts(self, pack: Pack, key: Tensor, value: Tensor) -> None:
        pair, prefix = [], pack.prefix_tokens
        for tensor in (key, value):
            block = tensor.new_zeros(len(tensor), pack.num_rows, self.places, tensor.shape[-1])
            rows = tensor.index_select(1, pack.padded_places.clamp(min=0))  # what stands at padding is never looked at
            block[:, :, : self.longest] = rows.view(len(tensor), pack.num_rows, self.longest, -1)
            pair.append(block)
        self.own.append((pair[0], pair[1]))
        self.prefix.append((key[:, None, :prefix].contiguous(), value[:, None, :prefix].contiguous()))


def decode_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, scaling: float, answers: AnswerCache, **_: Any
) -> tuple[Tensor, None]:
    """Packed attention for the prompts; then one query a row (1, H, R, D) over prefix and own places -> (1, R, H, D)."""
    cache, layer = answers, module.layer_idx
    cache.take(key, value, layer)
    if cache.view is not None:
        x = torch.cat([query, key, value], dim=1)[0].transpose(0, 1).flatten(1)
        return attend(x, query.shape[1], key.shape[1], cache.view, scaling).view(1, len(x), query.shape[1], -1), None
    keys, values = cache.own[layer]
    prefix_keys, prefix_values = cache.prefix[layer]
    kv_heads, rows, _, dim = keys.shape
    groups, prefix, used = query.shape[1] // kv_heads, prefix_keys.shape[2], int(cache.lengths.max()) + 1
    keys, values = (block.view(kv_heads * rows, -1, dim)[:, :used] for block in (keys, values))
    q = (query[0] * scaling).view(kv_heads, groups, rows, dim).transpose(1, 2).reshape(kv_heads * rows, groups, dim)
    own = torch.bmm(q, keys.transpose(1, 2))
    ahead = torch.arange(used) > cache.lengths[:, None]
    own = own.view(kv_heads, rows, groups, used).masked_fill(ahead[None, :, None], float("-inf"))
    shared = q.view(kv_heads, rows * groups, dim) @ prefix_keys[:, 0].transpose(1, 2)
    scores = torch.cat([shared.view(kv_heads, rows, groups, prefix), own], dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    on_prefix, on_own = weights.split([prefix, used], dim=-1)
    out = torch.bmm(on_own.reshape(kv_heads * rows, groups, used), values).view(kv_heads, rows * groups, dim)
    out = out + on_prefix.reshape(kv_heads, rows * groups, prefix) @ prefix_values[:, 0]
    return out.view(kv_heads, rows, groups, dim).transpose(0, 1).reshape(1, rows, kv_heads * groups, dim), None


AttentionInterface.register(NAME, decode_attention)


@torch.inference_mode()  # type: ignore[untyped-decorator]
def greedy_answers(
    model: Any, prompts: Sequence[Sequence[int]], stop_ids: Collection[int], max_new_tokens: int
) -> list[tuple[list[int], bool]]:
    """Ids of each answer without its stop token, and whether it ended by one; the model was loaded with this module's attention."""
    device = model.device
    pack = make_pack([_as_row(index, prompt) for index, prompt in enumerate(prompts)]).to(device)
    head_dim = model.model.layers[0].self_attn.head_dim
    cache = AnswerCache(pack, max_new_tokens, torch.empty(head_dim, dtype=model.dtype, device=device))
    answers: list[tuple[list[int], bool]] = [([], False) for _ in prompts]
    hidden = _hidden(model, pack.ids, pack.positions, cache)[pack.predicting_places]
    cache.view = None
    rows = torch.arange(len(prompts), device=device)
    prompt_lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    for count in range(1, max_new_tokens + 1):
        chosen = model.get_output_embeddings()(hidden).argmax(dim=-1)
        for row, token in zip(rows.tolist(), chosen.tolist(), strict=True):
            ids, ended = answers[row]
            if not ended:
                answers[row] = (ids, True) if token in stop_ids else ([*ids, token], False)
        active = torch.tensor([not answers[row][1] for row in rows.tolist()], device=device)
        if count == max_new_tokens or not active.any():
            break
        if active.float().mean() <= 1 - IDLE_SHARE:
            kept = active.nonzero()[:, 0]
            cache.keep(kept)
            rows, chosen = rows[kept], chosen[kept]
        positions = prompt_lengths[rows] + count - 1
        hidden = _hidden(model, chosen[None], positions[None], cache)
        cache.lengths = cache.lengths + 1
    return answers


def _hidden(model: Any, ids: Tensor, positions: Tensor, cache: AnswerCache) -> Tensor:
    # The model hands `answers` on to the attention as it is; a cache of its own kind has another name in each release of transformers.
    output = model.get_decoder()(input_ids=ids, position_ids=positions, use_cache=False, answers=cache)
    result: Tensor = output.last_hidden_state[0]
    return result


def _as_row(index: int, prompt: Sequence[int]) -> TokenRow:
    """The prompt with one token to predict after it, which is all that a pack wants to know."""
    return TokenRow(index, (*prompt, 0), (*[False] * len(prompt), True))
