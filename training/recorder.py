"""Figures of a training run: to the progress file at each step, to MLflow now and then, and into train.json at the end."""

from __future__ import annotations

from typing import Any

import torch

from infra.files import write_json_atomic
from infra.metric_stream import MetricStream
from infra.process import Progress, peak_rss_bytes
from training.config import FinetuneJob
from training.flops import peak_operations_per_s
from training.loop import StepReport, Trainer
from training.precision import precision_name
from training.samples import open_samples

SUMMARY_NAME = "train.json"
SAMPLES_NAME = "samples.json"
RATE_WINDOW_STEPS = 10
SERIES = ("loss", "learning_rate", "heldout_loss", "workers")  # pairs of a step and a value
SUMMED = ("rows", "tokens", "supervised_tokens", "seconds")


class Recorder:
    """What one worker tells of the run; silent but on rank 0, though every worker must call `step` and `heldout`."""

    def __init__(self, job: FinetuneJob, trainer: Trainer) -> None:
        self.history: dict[str, Any] = {**dict.fromkeys(SUMMED, 0), **{name: [] for name in SERIES}}
        self._job, self._trainer = job, trainer
        self._dtype = trainer.dtype
        self._recent: list[StepReport] = []
        is_first = trainer.layout.rank == 0
        self._progress = Progress(job.progress_file if is_first else None, "steps")
        self._metrics = MetricStream(job.tracking if is_first else None)
        self._samples = open_samples(job, trainer)
        self._peak_per_s = peak_operations_per_s(trainer.operations.widest, self._dtype, trainer.layout.device)

    def begin(self, history: dict[str, Any] | None = None) -> None:
        """Takes over what was recorded before a checkpoint, if any, and notes on how many workers the run goes on."""
        self.history = history or self.history
        workers = self.history["workers"]
        if not workers or workers[-1][1] != self._trainer.layout.num_workers:
            workers.append([self._trainer.step, self._trainer.layout.num_workers])

    def step(self, report: StepReport) -> None:
        """Takes in one optimizer step."""
        history = self.history
        for name in SUMMED:
            history[name] += getattr(report, name)
        self._recent = [*self._recent[-RATE_WINDOW_STEPS + 1 :], report]
        rates = self._rates()
        self._progress.report(report.step, report.total_steps, loss=report.loss, rows_per_s=rates["rows_per_s"])
        if report.step % self._job.train.log_steps == 0 or report.step in (1, report.total_steps):
            history["loss"].append([report.step, report.loss])
            history["learning_rate"].append([report.step, report.learning_rate])
            figures = {"loss": report.loss, "learning_rate": report.learning_rate, "gradient_norm": report.gradient_norm}
            self._metrics.log({**figures, **rates, **self._by_worker(), "memory_bytes": self._memory_bytes()}, report.step)

    def heldout(self, step: int, loss: float) -> None:
        """Takes in one held-out loss; a few answers go with it."""
        self.history["heldout_loss"].append([step, loss])
        self._metrics.log({"heldout_loss": loss}, step)
        if self._samples:
            self._metrics.log_table(self._samples.table(self._trainer), SAMPLES_NAME)

    @property
    def evals_since_lowest(self) -> int:
        """How many held-out losses have come since the lowest one."""
        losses = [loss for _, loss in self.history["heldout_loss"]]
        return len(losses) - 1 - losses.index(min(losses)) if losses else 0

    @property
    def best_step(self) -> int | None:
        """The step of the lowest held-out loss, the first of equal ones."""
        return min(self.history["heldout_loss"], key=lambda point: point[1], default=[None])[0]

    def finish(self, worker_seconds: float) -> None:
        """On rank 0: writes train.json and sends what is left."""
        if self._trainer.layout.rank != 0:
            return
        done = self.history
        seconds = max(done["seconds"], 1e-9)
        summary = {
            **done,
            "precision": precision_name(self._dtype),
            "worker_seconds": worker_seconds,
            "final_loss": done["loss"][-1][1] if done["loss"] else None,
            "final_heldout_loss": done["heldout_loss"][-1][1] if done["heldout_loss"] else None,
            "lowest_heldout_loss": min((loss for _, loss in done["heldout_loss"]), default=None),
            "steps": self._trainer.step,
            "memory_bytes": self._memory_bytes(),
            **{f"{name}_per_s": done[name] / seconds for name in SUMMED[:-1]},
        }
        write_json_atomic(self._job.output_dir / SUMMARY_NAME, summary)
        self._metrics.close()

    def _rates(self) -> dict[str, float]:
        """Over the last steps: rows and tokens a second of all workers, and this worker's share of its peak (MFU)."""
        seconds = max(sum(report.seconds for report in self._recent), 1e-9)
        rates = {f"{name}_per_s": sum(getattr(report, name) for report in self._recent) / seconds for name in SUMMED[:-1]}
        return {**rates, "mfu": sum(report.operations for report in self._recent) / seconds / self._peak_per_s}

    def _by_worker(self) -> dict[str, float]:
        """Share of the time that each worker spent on getting its rows ready."""
        seconds = max(sum(report.seconds for report in self._recent), 1e-9)
        shares = self._trainer.layout.all_values(sum(report.data_wait_s for report in self._recent) / seconds)
        return {f"data_wait_share/worker_{rank}": share for rank, share in enumerate(shares)}

    def _memory_bytes(self) -> int:
        """Most memory this worker has had: of its GPU, else of its process."""
        if self._trainer.layout.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self._trainer.layout.device))
        return peak_rss_bytes()
