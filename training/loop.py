"""One optimizer step after another, on one worker of a Ray Train group.

- The loss of a step is the sum over all supervised tokens of the global batch divided by their number, however the rows are cut into
  packs and dealt to workers; so accumulation and data parallelism change rounding and nothing else.
- A step is a pure function of weights, seed and step number, so a resumed run is the same run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from infra.errors import ConfigError
from training.batches import BatchPlan, count_supervised, worker_packs
from training.checkpoint import TrainState
from training.config import TrainConfig
from training.data.tokens import TokenRow
from training.flops import count_operations
from training.layout import Layout, count_sharers, gradient_norm, reduce_gradient
from training.model import PackModel
from training.optimizer import make_optimizer, read_state, set_learning_rate, write_state
from training.packing import Pack
from training.parameters import TrainableParameters
from training.precision import LossScale
from training.schedule import learning_rate, total_steps


@dataclass(frozen=True)
class StepReport:
    """Figures of one optimizer step over all workers."""

    step: int
    """Steps done, this one included."""
    total_steps: int
    loss: float
    """Mean over the supervised tokens of the global batch."""
    gradient_norm: float
    """Before clipping."""
    learning_rate: float
    seconds: float
    data_wait_s: float
    """Of this worker: until its packs were ready."""
    operations: int
    """Of this worker, in matrix products with weights; see training/flops.py."""
    rows: int
    tokens: int
    supervised_tokens: int


class Trainer:
    """Model, trained parameters and optimizer of one worker, with their position in the run."""

    def __init__(self, model: nn.Module, config: TrainConfig, rows: Sequence[TokenRow], layout: Layout | None = None) -> None:
        self.config, self.rows, self.layout = config, rows, layout or Layout()
        self.dtype: torch.dtype = model.dtype
        self.operations = count_operations(model)
        self.model = PackModel(model, config.gradient_checkpointing).to(self.layout.device)
        self._partial_names = frozenset[str]()
        if self.layout.mesh:
            from training.parallel import parallelize  # loads two seconds of torch.distributed that one worker has no use for

            self._partial_names = parallelize(self.model, self.layout)
        self._sharers = count_sharers(self.layout, self.model)
        self.trained = TrainableParameters(self.model)
        self.optimizer = make_optimizer(config, self.trained)
        self.plan = BatchPlan(config, len(rows))
        self.total_steps = total_steps(config, len(rows))
        self.step = 0
        self._scale = LossScale(is_active=self.dtype == torch.float16)
        self._remembered: Tensor | None = None

    def train_step(self) -> StepReport:
        """One optimizer step. Raises ConfigError that names the rows where a loss is not finite."""
        started = time.perf_counter()
        rows = [self.rows[index] for index in self.plan.rows_of_step(self.step)]
        supervised = count_supervised(rows)
        rate = learning_rate(self.config, self.step, self.total_steps)
        # Dropout follows from the step, so a resumed run repeats it; workers that share rows draw alike.
        torch.manual_seed(hash((self.config.seed, self.step, self.layout.data_rank)))
        self.model.train()
        self.trained.gradient.zero_()
        packs = self._packs(rows)
        data_wait_s = time.perf_counter() - started
        loss = self.layout.sum_losses(self._pass(packs, self._scale.value / supervised)) / supervised
        self._require_finite("loss", loss, rows)
        reduce_gradient(self.layout, self.trained, self._partial_names)
        norm = gradient_norm(self.layout, self.trained, self._sharers) / self._scale.value
        if self._scale.accepts(norm):
            self._require_finite("gradient norm", norm, rows)
            self._update(rate, norm)
        self.step += 1
        return StepReport(
            self.step, self.total_steps, loss, norm, rate, time.perf_counter() - started, data_wait_s,
            self.operations.of(packs) // self.layout.parts, len(rows), sum(len(row.ids) for row in rows), supervised,
        )  # fmt: skip

    def evaluate(self, rows: Sequence[TokenRow]) -> float:
        """Mean loss over the supervised tokens of `rows`, over all workers."""
        self.model.eval()
        with torch.no_grad():
            total = self._pass(self._packs(rows), 1.0)
        return self.layout.sum_losses(total) / max(count_supervised(rows), 1)

    def state(self, history: dict[str, Any]) -> TrainState:
        """What a checkpoint must hold; its tensors are the trainer's own."""
        state = TrainState(
            self.step, {"master": self.trained.master.detach()}, facts={"history": history, "loss_scale": self._scale.state()}
        )
        if self._remembered is not None:
            state.flat["remembered"] = self._remembered
        read_state(self.optimizer, state, self.trained.master.numel())
        return state

    def restore(self, state: TrainState) -> None:
        """Goes on from a checkpoint."""
        self.step = state.step
        self.trained.master.data.copy_(state.flat["master"])
        self.trained.publish()
        self._remembered = state.flat.get("remembered")
        self._scale.restore(state.facts["loss_scale"])
        write_state(self.optimizer, state)

    def remember(self) -> None:
        """Keeps a copy of the trained values as they are now."""
        self._remembered = self.trained.master.detach().clone()

    def recall(self) -> None:
        """Goes back to the values last remembered, if any."""
        if self._remembered is not None:
            self.trained.master.data.copy_(self._remembered)
            self.trained.publish()

    def _packs(self, rows: Sequence[TokenRow]) -> list[Pack]:
        """This worker's packs of one global batch."""
        layout = self.layout
        at_least = layout.sizes["pipeline"] if layout.is_split else 0  # a pipeline needs a pack for each of its stages
        packs = worker_packs(rows, self.config.micro_batch_rows, layout.data_rank, layout.data_size, at_least)
        return [pack.to(layout.device) for pack in packs]

    def _pass(self, packs: Sequence[Pack], weight: float) -> float:
        """Every pack forward and, where gradients are on, backward with its losses times `weight`; the sum of this worker's losses."""
        if self.layout.sizes["pipeline"] > 1:
            from training.stages import run_stages

            return run_stages(self.model, self.layout, packs, weight, backward=torch.is_grad_enabled())
        total = 0.0
        for pack in packs:
            losses = self.model(pack)
            if losses.requires_grad:
                (losses.sum() * weight).backward()
            total += float(losses.detach().double().sum())
        return total

    def _require_finite(self, name: str, value: float, rows: Sequence[TokenRow]) -> None:
        """Every worker sees the same value, so all stop at the same step."""
        if not math.isfinite(value):
            numbers = sorted(row.row for row in rows)
            raise ConfigError(
                f"step {self.step + 1}: the {name} is {value} in a batch with the rows {numbers} (counted from 0) of train.jsonl. "
                f"Lower train.learning_rate (now {self.config.learning_rate}) or look at those rows."
            )

    def _update(self, rate: float, norm: float) -> None:
        """Unscales, clips and applies the gradient. The fp32 values are the truth; the model computes with their rounded copy."""
        factor = min(1.0, self.config.max_gradient_norm / norm if norm else 1.0) / self._scale.value
        if factor != 1.0:
            self.trained.gradient.mul_(factor)
        set_learning_rate(self.optimizer, rate)
        self.optimizer.step()
        self.trained.publish()
