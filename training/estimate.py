"""`python -m training.estimate --config F`: memory and time of a fine-tuning run, told before it starts.

Memory is computed (training/memory.py) and held against what this machine has; only a run that fits is tried, for a few steps, which give
its time. One worker is measured, so for several the time leaves out what they say to each other.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from infra.contracts import verify
from infra.errors import ConfigError
from infra.files import read_json, write_json_atomic
from infra.process import peak_rss_bytes, run_program
from training.base import CONFIG_NAME
from training.config import EstimateJob, FinetuneJob, ParallelConfig, TrainConfig
from training.data.tokens import TokenRows, read_token_rows
from training.folders import fresh_folder
from training.memory import MemoryEstimate, PackShape, estimate, model_shape
from training.preflight import check_layout, count_trained

ESTIMATE_NAME = "estimate.json"
SAMPLED_STEPS = 50
USABLE_SHARE = 0.95
CGROUP = Path("/sys/fs/cgroup")


def estimate_run(job: EstimateJob) -> None:
    """Writes estimate.json. Raises ConfigError saying what would fit where this does not."""
    verify(job.base_dir, ("base",))
    verify(job.tokens_dir, ("tokens",))
    check_layout(job)
    rows = read_token_rows(job.tokens_dir, "train")
    available_bytes = available_memory_bytes(job.train)
    needed = memory_of(job, job.train, rows)
    if needed.total > USABLE_SHARE * available_bytes:
        raise ConfigError(refusal(job, rows, needed, available_bytes))
    fresh_folder(job.output_dir)
    facts = {"memory_bytes": {**asdict(needed), "total": needed.total, "available": available_bytes}}
    write_json_atomic(job.output_dir / ESTIMATE_NAME, {**facts, **measure(job, rows)})


def memory_of(job: FinetuneJob, train: TrainConfig, rows: TokenRows) -> MemoryEstimate:
    """The estimate for these settings on this model and these rows."""
    from training.precision import compute_dtype, precision_name

    num_trained = count_trained(job.model_copy(update={"train": train}))
    shape = model_shape(read_json(job.base_dir / CONFIG_NAME))
    return estimate(shape, train, precision_name(compute_dtype(train.precision)), num_trained, largest_pack(train, rows))


def largest_pack(train: TrainConfig, rows: TokenRows) -> PackShape:
    """The largest of one worker's packs over some of the first steps."""
    from training.batches import BatchPlan, worker_packs

    plan = BatchPlan(train, len(rows))
    data_size = train.min_workers // (train.parallel.pipeline * train.parallel.tensor)  # the fewer workers, the larger a worker's packs
    steps = range(min(SAMPLED_STEPS, -(-len(rows) // train.batch_rows)))
    batches = ([rows[index] for index in plan.rows_of_step(step)] for step in steps)
    packs = (pack for batch in batches for pack in worker_packs(batch, train.micro_batch_rows, 0, data_size))
    largest = max(packs, key=lambda pack: pack.ids.numel())
    longest = len(largest.padded_places) // largest.num_rows
    return PackShape(largest.ids.numel(), largest.num_rows, longest, largest.prefix_tokens, largest.num_supervised)


def available_memory_bytes(train: TrainConfig) -> int:
    """What one worker may use: its GPU, or its share of this machine."""
    import psutil
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[1])
    return int(min(psutil.virtual_memory().available, _container_bytes()) // train.max_workers)


def _container_bytes() -> int:
    """What the container's limit leaves (control groups, version 2); without a limit more than any machine has."""
    limit, used = (CGROUP / name for name in ("memory.max", "memory.current"))
    text = limit.read_text().strip() if limit.is_file() else "max"
    return 1 << 60 if text == "max" else int(text) - int(used.read_text())


def refusal(job: FinetuneJob, rows: TokenRows, needed: MemoryEstimate, available_bytes: int) -> str:
    """What was needed and found, and each single change that would fit."""
    fitting = [name for name, train in alternatives(job.train) if memory_of(job, train, rows).total <= USABLE_SHARE * available_bytes]
    parts = ", ".join(f"{name} {_gb(value)}" for name, value in asdict(needed).items())
    would = f"Any of these fits: {'; '.join(fitting)}." if fitting else "No single change would fit: take a smaller base model."
    return f"one worker needs {_gb(needed.total)} ({parts}), and {_gb(available_bytes)} are free for it. {would}"


def alternatives(train: TrainConfig) -> list[tuple[str, TrainConfig]]:
    """Changes that save memory, mildest first; those that the settings do not allow are left out."""
    halves = [train.micro_batch_rows // 2**power for power in range(1, train.micro_batch_rows.bit_length())]
    fewer = [(f"train.micro_batch_rows={rows}", {"micro_batch_rows": rows}) for rows in (*halves[:1], *halves[-1:])]
    changes: list[tuple[str, dict[str, Any]]] = [*fewer]
    changes += [
        ("train.gradient_checkpointing=true", {"gradient_checkpointing": True}),
        ("train.optimizer=adamw_8bit", {"optimizer": "adamw_8bit"}),
        ("train.base_quantization=nf4", {"base_quantization": "nf4"}),
        ("train.method=lora", {"method": "lora"}),
    ]
    for workers in (2, 4, 8):
        parallel = train.parallel.model_copy(update={"shard": train.parallel.shard * workers})
        name = f"train.parallel.shard={parallel.shard} on {train.max_workers * workers} workers of this size"
        changes.append((name, {"parallel": parallel.model_dump(), "num_workers": train.max_workers * workers}))
    found = []
    for name, change in changes:
        try:
            found.append((name, TrainConfig.model_validate({**train.model_dump(), **change})))
        except ValueError:
            continue
    return found


def measure(job: EstimateJob, rows: TokenRows) -> dict[str, Any]:
    """Seconds of a step and of the whole run, and the most memory that this process has used."""
    import torch

    from training.loop import Trainer
    from training.model import prepare_model
    from training.precision import compute_dtype
    from training.schedule import total_steps

    alone = job.train.model_copy(update={"num_workers": 1, "parallel": ParallelConfig()})
    share = alone.model_copy(update={"batch_rows": max(1, job.train.batch_rows // job.train.max_workers)})
    if job.train.cpus_per_worker:
        torch.set_num_threads(job.train.cpus_per_worker)
    trainer = Trainer(prepare_model(job.base_dir, share, compute_dtype(share.precision)), share, rows)
    reports = [trainer.train_step() for _ in range(min(job.measured_steps + 1, trainer.total_steps))]
    timed = reports[1:] or reports  # the first one warms up
    step_s = sum(report.seconds for report in timed) / len(timed)
    steps = total_steps(job.train, len(rows))
    return {
        "steps": steps,
        "step_s": step_s,
        "total_s": steps * step_s,
        "measured_steps": len(timed),
        "measured_peak_bytes": peak_rss_bytes(),
    }


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"


if __name__ == "__main__":
    run_program(EstimateJob, estimate_run)
