"""Options of the datasets that Slipway builds itself; light, so that a spec is checked without their parsers."""

from __future__ import annotations

from pydantic import Field

from infra.config import Config


class SmartHomeOptions(Config):
    """Size and split of the smart-home dataset."""

    train_rows: int = Field(2500, ge=1, le=100_000)
    """Training rows."""
    heldout_rows: int = Field(300, ge=2, le=10_000)
    """Held-out rows; no utterance of theirs is in the training rows."""
    unseen_share: float = Field(0.5, ge=0, le=1)
    """Share of the held-out rows whose sentence template appears in no training row."""
    seed: int = Field(0, ge=0)
    """Same seed, same bytes."""
