"""Sizes that a model's config.json tells, wherever both stacks or the driver ask for them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def head_size(config: Mapping[str, Any]) -> int:
    """Numbers of one attention head; some families say them, in others the hidden size is shared out among the heads."""
    size: int = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return size


def row_sizes(config: Mapping[str, Any]) -> set[int]:
    """Numbers in a row of the weight matrices: of what goes into a layer, out of its attention, and through its feed-forward part."""
    heads = config.get("num_attention_heads", 1)
    return {config.get("hidden_size"), config.get("intermediate_size"), heads * (config.get("head_dim") or 0)} - {None, 0}


def dividing(candidates: Iterable[int], sizes: Iterable[int]) -> list[int]:
    """The candidates, in their order, into whose groups all the sizes fall without a rest."""
    sizes = list(sizes)
    return [each for each in candidates if all(size % each == 0 for size in sizes)]
