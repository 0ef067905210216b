"""How many steps there are, and the learning rate of each."""

from __future__ import annotations

import math

from training.config import TrainConfig


def total_steps(config: TrainConfig, num_rows: int) -> int:
    """Optimizer steps of the whole run; an epoch's last batch may be smaller than the others."""
    steps = math.ceil(config.epochs * steps_per_epoch(config, num_rows))
    return min(steps, config.max_steps) if config.max_steps else steps


def steps_per_epoch(config: TrainConfig, num_rows: int) -> int:
    """Optimizer steps of one pass over the rows."""
    return math.ceil(num_rows / config.batch_rows)


def learning_rate(config: TrainConfig, step: int, num_steps: int) -> float:
    """Linear warm-up, then the schedule down to the final share; `step` counts from zero and no step has rate zero in warm-up."""
    warmup_steps = math.ceil(config.warmup_share * num_steps)
    if step < warmup_steps:
        return config.learning_rate * (step + 1) / warmup_steps
    floor = config.final_learning_rate_share
    return config.learning_rate * (floor + (1 - floor) * _height(config, step, warmup_steps, num_steps))


def _height(config: TrainConfig, step: int, warmup_steps: int, num_steps: int) -> float:
    """The schedule between its peak, 1, and its end, 0."""
    progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "linear":
        return 1.0 - progress
    if config.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    decay_steps = max(1, min(math.ceil(config.decay_share * num_steps), num_steps - warmup_steps))
    decayed = max(0, step - (num_steps - decay_steps)) / decay_steps
    return 1.0 - math.sqrt(decayed)  # the shape that Haegele et al. 2024 (arXiv 2405.18392) found best
