"""What a finished run leaves: an adapter in PEFT's format, or with full fine-tuning the whole model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from infra.files import write_json_atomic
from training import lora
from training.adapter import ADAPTER_CONFIG_NAME, ADAPTER_NAME
from training.config import FinetuneJob, LoraConfig
from training.layout import Layout
from training.loop import Trainer
from training.weights import safetensors_writer, tensor_specs, weight_files

OWN_PREFIX = "causal_model."
HEAD_NAME = "lm_head.weight"
EMBEDDING_NAME = "model.embed_tokens.weight"


def write_result(trainer: Trainer, job: FinetuneJob) -> None:
    """Rank 0 writes the trained values; every worker must call."""
    tensors = gather(trainer)
    if trainer.layout.rank != 0:
        return
    if job.train.method == "full":
        write_weights(job.base_dir, job.output_dir, tensors)
        return
    named = {lora.peft_name(name): value for name, value in tensors.items()}
    save_file(named, str(job.output_dir / ADAPTER_NAME), metadata={"format": "pt"})
    write_json_atomic(job.output_dir / ADAPTER_CONFIG_NAME, peft_config(job.train.lora))


def gather(trainer: Trainer) -> dict[str, Tensor]:
    """The trained values in fp32, whole and by their names in the base model; complete on rank 0."""
    own = {name.removeprefix(OWN_PREFIX): value for name, value in trainer.trained.whole_tensors().items()}
    return gather_stages(trainer.layout, own)


def gather_stages(layout: Layout, own: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of all pipeline stages together, on the first stage."""
    if layout.mesh is None or layout.sizes["pipeline"] == 1:
        return own
    is_first = layout.place("pipeline") == 0
    parts: list[Any] = [None] * layout.sizes["pipeline"]
    dist.gather_object(own, parts if is_first else None, group=layout.mesh.get_group("pipeline"), group_dst=0)
    return {name: value for part in parts for name, value in (part or {}).items()}


def write_weights(base_dir: Path, output_dir: Path, tensors: Mapping[str, Tensor]) -> None:
    """The base's files with the trained values in them, each in the base's own dtype; tied embeddings stay tied."""
    for name in weight_files(base_dir):
        specs = tensor_specs(base_dir / name)
        with (
            safe_open(base_dir / name, framework="pt") as weights,
            safetensors_writer(output_dir / name, specs, {"format": "pt"}) as writer,
        ):
            for spec in specs:
                before = weights.get_tensor(spec.name)
                value = tensors.get(EMBEDDING_NAME if spec.name == HEAD_NAME and HEAD_NAME not in tensors else spec.name, before)
                writer.write(spec.name, value.to(before.dtype).contiguous().view(torch.uint8).numpy().data.cast("B"))


def peft_config(config: LoraConfig) -> dict[str, Any]:
    """The adapter_config.json that peft makes of these settings."""
    import peft

    made = peft.LoraConfig(
        r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, use_rslora=config.use_rslora, use_dora=config.use_dora,
        target_modules=list(config.target_modules), task_type="CAUSAL_LM", bias="none", inference_mode=True,
    )  # fmt: skip
    stored = {key: sorted(value) if isinstance(value, set) else value for key, value in made.to_dict().items()}
    result: dict[str, Any] = json.loads(json.dumps(stored))
    return result
