"""Training in several real processes, joined by gloo, without Ray: what the parallel tests start."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from safetensors.torch import load_file, save_file

from training.checkpoint import CheckpointStore
from training.config import TrainConfig
from training.data.tokens import read_token_rows
from training.layout import Layout
from training.loop import Trainer
from training.model import prepare_model
from training.result import gather

CHECKPOINT_STEP = 6


def train_in_processes(
    configs: Sequence[TrainConfig], base_dir: Path, tokens_dir: Path, steps: int, place: Path, resume: bool = False
) -> list[dict[str, Any]]:
    """Of each config, all for the same number of workers: losses, gradient norms, held-out loss and gathered values after `steps`.

    A config with a `checkpoint_url` leaves a checkpoint there after `CHECKPOINT_STEP`, and with `resume` begins from it.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place.mkdir(parents=True)
    arguments = ([config.model_dump_json() for config in configs], base_dir, tokens_dir, steps, place, port, resume)
    multiprocessing.spawn(_work, args=arguments, nprocs=configs[0].num_workers)
    return [
        {**json.loads((place / f"{index}.json").read_text()), "values": load_file(place / f"{index}.safetensors")}
        for index in range(len(configs))
    ]


def _work(rank: int, configs: Sequence[str], base_dir: Path, tokens_dir: Path, steps: int, place: Path, port: int, resume: bool) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    for index, text in enumerate(configs):
        config = TrainConfig.model_validate_json(text)
        if not dist.is_initialized():
            dist.init_process_group("gloo", rank=rank, world_size=config.num_workers)
        layout = Layout(config.parallel, config.num_workers)
        trainer = Trainer(prepare_model(base_dir, config, torch.float32), config, read_token_rows(tokens_dir, "train"), layout)
        store = CheckpointStore(config.checkpoint_url or str(place / "unused"), "f", 2, layout, trainer.trained)
        if resume:
            state = store.load_latest()
            assert state is not None
            trainer.restore(state)
        reports = []
        while trainer.step < steps:
            reports.append(trainer.train_step())
            if config.checkpoint_url and trainer.step == CHECKPOINT_STEP:
                store.save(trainer.state({}))
        store.finish()
        heldout_loss = trainer.evaluate(read_token_rows(tokens_dir, "heldout"))
        values = gather(trainer)
        if rank == 0:
            figures = {name: [getattr(report, name) for report in reports] for name in ("loss", "gradient_norm")}
            (place / f"{index}.json").write_text(json.dumps({**figures, "heldout_loss": heldout_loss}))
            save_file(values, place / f"{index}.safetensors")
    dist.destroy_process_group()
