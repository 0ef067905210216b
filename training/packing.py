"""A micro-batch as one sequence without padding, the rows' common beginning in it only once.

Layout: `[prefix, row 0, row 1, ...]`. Every token sees the prefix and its own row, never another row, and keeps the position that it has
in its own row; so the values are those of a padded batch, and linear layers run over real tokens only. In the smart-home rows 24 of 62
tokens are the same in every row, and half of a padded batch would be padding and prefix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise

import torch
from torch import Tensor

from training.data.tokens import TokenRow

MIN_PREFIX_TOKENS = 4
PREFIX_ROW = -1


@dataclass(frozen=True)
class Pack:
    """One micro-batch of R rows, T tokens, S supervised tokens; L is the longest row without the prefix."""

    ids: Tensor
    """(1, T) token ids."""
    positions: Tensor
    """(1, T) position of each token in its own row."""
    prefix_tokens: int
    padded_places: Tensor
    """(R * L) place in the pack of each token of the padded rows, -1 for padding."""
    packed_places: Tensor
    """(T) place in the padded rows of each token of the pack, -1 for prefix and filler: the inverse of `padded_places`."""
    token_rows: Tensor
    """(T) index in the pack of each token's row, `PREFIX_ROW` for the prefix and R for filler."""
    num_rows: int
    predicting_places: Tensor
    """(S) places whose next token is supervised."""
    targets: Tensor
    """(S) those next tokens."""
    target_rows: Tensor
    """(S) index in the pack of the row each belongs to."""
    row_numbers: tuple[int, ...]
    """Index of each row in its split's file."""
    row_tokens: int
    """Tokens of the rows as they were given, for the rate that is reported."""

    @property
    def num_supervised(self) -> int:
        """Supervised tokens."""
        return len(self.targets)

    def to(self, device: torch.device) -> Pack:
        """The same pack with its tensors on a device."""
        if device.type == "cpu":
            return self
        found = {each.name: getattr(self, each.name) for each in fields(self)}
        return replace(self, **{name: value.to(device, non_blocking=True) for name, value in found.items() if isinstance(value, Tensor)})


def make_pack(rows: Sequence[TokenRow], multiple: int = 1) -> Pack:
    """The pack of `rows`, which need at least one supervised token each after their first token.

    The pack, by at least one token, and the padded rows are lengthened to a multiple of `multiple` with tokens that nothing sees.
    """
    labels = [[place for place in range(1, len(row.ids)) if row.supervised[place]] for row in rows]
    prefix = _common_prefix(rows, labels)
    inputs = [row.ids[prefix : places[-1]] for row, places in zip(rows, labels, strict=True)]  # nothing is predicted beyond the last label
    starts = [prefix]
    for tokens in inputs:
        starts.append(starts[-1] + len(tokens))
    longest = _rounded(max(len(tokens) for tokens in inputs), max(1, multiple // 4))
    filler = [0] * (_rounded(starts[-1] + 1, multiple) - starts[-1])
    padded = [[start + place if start + place < end else -1 for place in range(longest)] for start, end in pairwise(starts)]
    packed = [-1] * prefix + [index * longest + place for index, tokens in enumerate(inputs) for place in range(len(tokens))]
    packed += [-1] * len(filler)
    token_rows = [PREFIX_ROW] * prefix + [index for index, tokens in enumerate(inputs) for _ in tokens] + [len(rows)] * len(filler)
    positions = [*range(prefix), *(prefix + place for tokens in inputs for place in range(len(tokens))), *filler]
    return Pack(
        ids=torch.tensor([[*rows[0].ids[:prefix], *(token for tokens in inputs for token in tokens), *filler]]),
        positions=torch.tensor([positions]),
        prefix_tokens=prefix,
        padded_places=torch.tensor(padded).flatten(),
        packed_places=torch.tensor(packed),
        token_rows=torch.tensor(token_rows),
        num_rows=len(rows),
        predicting_places=torch.tensor([starts[i] + place - 1 - prefix for i, places in enumerate(labels) for place in places]),
        targets=torch.tensor([rows[i].ids[place] for i, places in enumerate(labels) for place in places]),
        target_rows=torch.tensor([i for i, places in enumerate(labels) for _ in places]),
        row_numbers=tuple(row.row for row in rows),
        row_tokens=sum(len(row.ids) for row in rows),
    )


def _rounded(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def without_labels(pack: Pack) -> Pack:
    """A pack that gives no loss and gradients of zero."""
    return replace(pack, predicting_places=pack.predicting_places[:0], targets=pack.targets[:0], target_rows=pack.target_rows[:0])


def _common_prefix(rows: Sequence[TokenRow], labels: Sequence[Sequence[int]]) -> int:
    """Tokens that begin every row, ending before the first token that predicts a supervised one."""
    if len(rows) < 2:
        return 0
    limit = min(places[0] for places in labels) - 1
    first = rows[0].ids
    length = next((place for place in range(limit) if any(row.ids[place] != first[place] for row in rows)), max(limit, 0))
    return length if length >= MIN_PREFIX_TOKENS else 0
