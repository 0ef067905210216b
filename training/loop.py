"""One optimizer step after another, on one worker of a Ray Train group.

- The loss of a step is the sum over all supervised tokens of the global batch divided by their number, however the rows are cut into
  packs and dealt to workers; so accumulation and data parallelism change rounding and nothing else.
- A step is a pure function of weights, seed and step number, so a resumed run is the same run.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from infra.errors import ConfigError
from training.batches import BatchPlan, count_supervised, worker_packs
from training.checkpoint import TrainState
from training.config import TrainConfig
from training.data.tokens import TokenRow
from training.lora import AdapterParameters
from training.model import token_losses
from training.packing import Pack
from training.schedule import learning_rate, total_steps

SGD_MOMENTUM = 0.9


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
    rows: int
    tokens: int
    supervised_tokens: int


def make_optimizer(config: TrainConfig, parameters: Tensor) -> torch.optim.Optimizer:
    """The configured optimizer of one flat tensor; the learning rate is set before each step."""
    if config.optimizer == "sgd":
        return torch.optim.SGD([parameters], momentum=SGD_MOMENTUM, weight_decay=config.weight_decay, foreach=False)
    return torch.optim.AdamW([parameters], weight_decay=config.weight_decay, foreach=False)


class Trainer:
    """Model, adapters and optimizer of one worker, with their position in the run."""

    def __init__(self, model: nn.Module, config: TrainConfig, rows: Sequence[TokenRow], rank: int = 0, num_workers: int = 1) -> None:
        self.model, self.config, self.rows = model, config, rows
        self.rank, self.num_workers = rank, num_workers
        self.adapters = AdapterParameters(model)
        self.optimizer = make_optimizer(config, self.adapters.master)
        self.plan = BatchPlan(config, len(rows))
        self.total_steps = total_steps(config, len(rows))
        self.step = 0
        self._remembered: Tensor | None = None

    def train_step(self) -> StepReport:
        """One optimizer step. Raises ConfigError that names the rows where a loss is not finite."""
        started = time.perf_counter()
        rows = [self.rows[index] for index in self.plan.rows_of_step(self.step)]
        supervised = count_supervised(rows)
        rate = learning_rate(self.config, self.step, self.total_steps)
        torch.manual_seed(hash((self.config.seed, self.step, self.rank)))  # dropout follows from the step, so a resumed run repeats it
        self.model.train(self.config.lora.dropout > 0)
        losses = self._accumulate(worker_packs(rows, self.config.micro_batch_rows, self.rank, self.num_workers), supervised)
        loss = self._reduce(losses, rows)
        norm = float(self.adapters.gradient.norm())
        self._update(rate, norm)
        self.step += 1
        seconds = time.perf_counter() - started
        return StepReport(self.step, self.total_steps, loss, norm, rate, seconds, len(rows), sum(len(row.ids) for row in rows), supervised)

    def evaluate(self, rows: Sequence[TokenRow]) -> float:
        """Mean loss over the supervised tokens of `rows`, over all workers."""
        self.model.eval()
        total = torch.zeros(1, dtype=torch.float64)
        with torch.no_grad():
            for pack in worker_packs(rows, self.config.micro_batch_rows, self.rank, self.num_workers):
                total += token_losses(self.model, pack).sum().double()
        return float(self._sum_over_workers(total)) / max(count_supervised(rows), 1)

    def state(self, history: dict[str, Any]) -> TrainState:
        """A copy of what a checkpoint must hold."""
        moments = self.optimizer.state[self.adapters.master]
        tensors = {"master": self.adapters.master.detach().clone()}
        tensors |= {name: moment.clone() for name, moment in moments.items() if name != "step" and moment is not None}
        if self._remembered is not None:
            tensors["remembered"] = self._remembered
        return TrainState(self.step, tensors, history)

    def restore(self, state: TrainState) -> None:
        """Goes on from a checkpoint."""
        self.step = state.step
        self.adapters.master.data.copy_(state.tensors["master"])
        self.adapters.publish()
        self._remembered = state.tensors.get("remembered")
        moments = {name: tensor for name, tensor in state.tensors.items() if name not in ("master", "remembered")}
        self.optimizer.state[self.adapters.master] = {"step": torch.tensor(float(state.step)), **moments}

    def remember(self) -> None:
        """Keeps a copy of the adapters as they are now."""
        self._remembered = self.adapters.master.detach().clone()

    def recall(self) -> None:
        """Goes back to the adapters last remembered, if any."""
        if self._remembered is not None:
            self.adapters.master.data.copy_(self._remembered)
            self.adapters.publish()

    def _accumulate(self, packs: Sequence[Pack], supervised: int) -> float:
        """Gradients of this worker's packs, collected in fp32; the sum of their losses."""
        self.adapters.gradient.zero_()
        total = 0.0
        for pack in packs:
            losses = token_losses(self.model, pack)
            (losses.sum() / supervised).backward()
            self.adapters.collect_gradient()
            total += float(losses.detach().double().sum())
        return total

    def _reduce(self, loss_sum: float, rows: Sequence[TokenRow]) -> float:
        """Sums gradients and loss over all workers; the mean loss. Every worker sees a bad loss, so all stop at the same step."""
        if self.num_workers > 1:
            dist.all_reduce(self.adapters.gradient)
        loss = float(self._sum_over_workers(torch.tensor([loss_sum], dtype=torch.float64))) / count_supervised(rows)
        if not torch.isfinite(torch.tensor(loss)):
            numbers = sorted(row.row for row in rows)
            raise ConfigError(
                f"step {self.step + 1}: the loss is {loss} in a batch with the rows {numbers} (counted from 0) of train.jsonl. "
                f"Lower training.learning_rate (now {self.config.learning_rate}) or look at those rows."
            )
        return loss

    def _update(self, rate: float, norm: float) -> None:
        """Clips and applies the gradient. The optimizer's own fp32 values are the truth; the model computes with their rounded copy."""
        if norm > self.config.max_gradient_norm:
            self.adapters.gradient.mul_(self.config.max_gradient_norm / norm)
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.step()
        self.adapters.publish()

    def _sum_over_workers(self, value: Tensor) -> Tensor:
        if self.num_workers > 1:
            dist.all_reduce(value)
        return value
