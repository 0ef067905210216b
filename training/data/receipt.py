"""What became of every row and token: kept, or dropped for a reason that has a name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from infra.errors import ConfigError
from training.data.tokens import TokenRow

DROP_REASONS = {
    "too_long": "longer than max_tokens",
    "template_refused": "the chat template refuses the messages",
    "template_boundary": "the tokens of the prompt are not the first tokens of prompt and answer",
    "no_stop_token": "the template ends an answer without a stop token of the model",
    "stop_token_inside": "an answer holds a stop token in its middle",
    "nothing_to_learn": "no token of the text is left but the stop token",
}


class DroppedRow(ValueError):
    """A row that cannot be used; the text is one of `DROP_REASONS`."""


@dataclass
class Receipt:
    """Counts of one split, for people and for gates: every row and token read, and what became of it."""

    rows_read: int = 0
    rows_kept: int = 0
    rows_dropped: dict[str, int] = field(default_factory=dict)
    rows_truncated: int = 0
    tokens_read: int = 0
    tokens_kept: int = 0
    tokens_supervised: int = 0
    rows_ending_in_stop: int = 0
    longest_row_tokens: int = 0

    def drop(self, reason: str) -> None:
        """Counts one lost row."""
        self.rows_dropped[reason] = self.rows_dropped.get(reason, 0) + 1

    def keep(self, row: TokenRow, stop_ids: Sequence[int]) -> None:
        """Counts one kept row."""
        self.rows_kept += 1
        self.tokens_kept += len(row.ids)
        self.tokens_supervised += sum(row.supervised)
        self.rows_ending_in_stop += row.ids[last_label(row)] in stop_ids
        self.longest_row_tokens = max(self.longest_row_tokens, len(row.ids))

    def add(self, other: Receipt) -> None:
        """Takes the counts of another part of the split in."""
        for name, value in asdict(other).items():
            if name == "rows_dropped":
                self.rows_dropped = dict(Counter(self.rows_dropped) + Counter(value))
            elif name == "longest_row_tokens":
                self.longest_row_tokens = max(self.longest_row_tokens, value)
            else:
                setattr(self, name, getattr(self, name) + value)

    @property
    def lost_share(self) -> float:
        """Share of the rows read that were dropped."""
        return sum(self.rows_dropped.values()) / max(self.rows_read, 1)

    def summary(self) -> dict[str, Any]:
        """All counts and the shares that follow from them."""
        shares = {
            "supervised_share": self.tokens_supervised / max(self.tokens_kept, 1),
            "eos_coverage": self.rows_ending_in_stop / max(self.rows_kept, 1),
        }
        return {**asdict(self), "rows_dropped": dict(sorted(self.rows_dropped.items())), **shares}


def check_losses(receipts: Mapping[str, Receipt], max_lost_share: float, max_tokens: int) -> None:
    """Raises ConfigError where a split lost more rows than allowed, or all."""
    lines = []
    for name, receipt in receipts.items():
        if receipt.lost_share > max_lost_share or not receipt.rows_kept:
            reasons = [f"{count} {reason} ({DROP_REASONS[reason]})" for reason, count in sorted(receipt.rows_dropped.items())]
            lines.append(f"  - {name}.jsonl: {sum(receipt.rows_dropped.values())} of {receipt.rows_read} rows lost: {', '.join(reasons)}")
    if lines:
        raise ConfigError(
            f"too many rows cannot be used with this model (max_tokens {max_tokens})\n" + "\n".join(lines) + "\n"
            f"At most a share of {max_lost_share} may be lost: mend those rows, or raise data.max_lost_share or data.max_tokens."
        )


def last_label(row: TokenRow) -> int:
    """Position of the last supervised token."""
    return max(place for place, labelled in enumerate(row.supervised) if labelled)
