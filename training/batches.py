"""Which rows make which step, on which worker; a pure function of seed, step and number of workers."""

from __future__ import annotations

import random
from collections.abc import Sequence

from training.config import TrainConfig
from training.data.tokens import TokenRow
from training.packing import Pack, make_pack
from training.schedule import steps_per_epoch


class BatchPlan:
    """The order of rows; the same for every worker and after every restart."""

    def __init__(self, config: TrainConfig, num_rows: int) -> None:
        self._config = config
        self._num_rows = num_rows
        self._epoch = -1
        self._order: list[int] = []

    def rows_of_step(self, step: int) -> list[int]:
        """Indices of the rows of one global batch, shuffled anew each epoch."""
        epoch, within = divmod(step, steps_per_epoch(self._config, self._num_rows))
        if epoch != self._epoch:
            self._order = list(range(self._num_rows))
            random.Random(f"{self._config.seed}/{epoch}").shuffle(self._order)
            self._epoch = epoch
        start = within * self._config.batch_rows
        return self._order[start : start + self._config.batch_rows]


def worker_packs(rows: Sequence[TokenRow], micro_batch_rows: int, rank: int, num_workers: int) -> list[Pack]:
    """This worker's share of one global batch: rows sorted by length and dealt in turn, then cut into packs of similar lengths.

    A worker with no row gets no pack; together the workers' packs hold every row once.
    """
    by_length = sorted(rows, key=lambda row: (len(row.ids), row.row))
    own = by_length[rank::num_workers]
    return [make_pack(own[start : start + micro_batch_rows]) for start in range(0, len(own), micro_batch_rows)]


def count_supervised(rows: Sequence[TokenRow]) -> int:
    """Supervised tokens of a global batch; a token that begins a row cannot be predicted."""
    return sum(sum(row.supervised[1:]) for row in rows)
