"""Which rows make which step, on which worker; a pure function of seed, step and number of workers."""

from __future__ import annotations

import math
import random
from array import array
from collections.abc import Sequence
from itertools import pairwise

from training.config import TrainConfig
from training.data.tokens import TokenRow
from training.packing import Pack, make_pack, without_labels
from training.schedule import steps_per_epoch

PACK_MULTIPLE = 16  # sizes that recur are freed into places that fit: 1.64 instead of 2.10 GB after 40 steps of the demo, as fast


class BatchPlan:
    """The order of rows; the same for every worker and after every restart."""

    def __init__(self, config: TrainConfig, num_rows: int) -> None:
        self._config = config
        self._num_rows = num_rows
        self._epoch = -1
        self._order = array("q")  # eight bytes a row

    def rows_of_step(self, step: int) -> Sequence[int]:
        """Indices of the rows of one global batch, shuffled anew each epoch."""
        epoch, within = divmod(step, steps_per_epoch(self._config, self._num_rows))
        if epoch != self._epoch:
            self._order = array("q", range(self._num_rows))
            random.Random(f"{self._config.seed}/{epoch}").shuffle(self._order)
            self._epoch = epoch
        start = within * self._config.batch_rows
        return self._order[start : start + self._config.batch_rows]


def worker_packs(rows: Sequence[TokenRow], micro_batch_rows: int, data_rank: int, data_size: int, at_least: int = 0) -> list[Pack]:
    """This worker's share of one global batch: rows sorted by length and dealt in turn, then cut into packs of similar lengths.

    Together the workers' packs hold every row once. With `at_least` each worker gets the same number of packs and no fewer than that,
    because workers that hold parts of one model must make every pass together; a pack that only fills up has no label.
    """
    by_length = sorted(rows, key=lambda row: (len(row.ids), row.row))
    own = by_length[data_rank::data_size]
    number = max(math.ceil(math.ceil(len(rows) / data_size) / micro_batch_rows), at_least)
    cuts = [len(own) * part // number for part in range(number + 1)]
    packs = [make_pack(own[start:end], PACK_MULTIPLE) for start, end in pairwise(cuts) if end > start]
    return packs + [without_labels(make_pack(by_length[:1]))] * ((number - len(packs)) if at_least else 0)


def count_supervised(rows: Sequence[TokenRow]) -> int:
    """Supervised tokens of a global batch; a token that begins a row cannot be predicted."""
    return sum(sum(row.supervised[1:]) for row in rows)
