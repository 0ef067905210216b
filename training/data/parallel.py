"""A dataset's blocks rendered one after another here, or for a large one by Ray Data's workers: the same blocks in the same order.

Ray Data streams: only as many blocks are under way as its object store has room for, and a lost worker's block is rendered again.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from infra.local_ray import local_ray
from training.config import DataConfig
from training.data.blocks import Lines, Rendered, Renderer

LARGE_BYTES = 64 << 20  # one core renders 2.5 MB/s, so half of this is what a second one does while Ray starts and stops
OBJECT_STORE_BYTES = 128 << 20

RenderBlocks = Callable[[Iterator[Lines]], Iterator[Rendered]]


def choose_num_workers(config: DataConfig, size_bytes: int) -> int:
    """Processes that render a dataset of this size."""
    if config.num_workers is not None or size_bytes < LARGE_BYTES:
        return config.num_workers or 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def block_rendering(base_dir: Path, max_tokens: int, num_workers: int) -> Iterator[RenderBlocks]:
    """A function that renders blocks in their order, usable while the context lasts."""
    if num_workers == 1:
        yield partial(map, Renderer(base_dir, max_tokens).render)
        return
    with local_ray(num_workers, OBJECT_STORE_BYTES):
        yield partial(_render_on_ray, base_dir, max_tokens)


def _render_on_ray(base_dir: Path, max_tokens: int, blocks: Iterator[Lines]) -> Iterator[Rendered]:
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)  # its own set-up makes it talk on import
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    rows = [asdict(lines) for lines in blocks]
    if not rows:
        return
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
    for row in dataset.map(_render_row, fn_args=(base_dir, max_tokens)).iter_rows():
        yield Rendered(**row)


def _render_row(row: dict[str, Any], base_dir: Path, max_tokens: int) -> dict[str, Any]:
    """In a worker: the block that a row of Ray Data names."""
    return asdict(_renderer(base_dir, max_tokens).render(Lines(**row)))


_renderer = lru_cache(maxsize=1)(Renderer)  # a worker process renders many blocks
