"""What can be refused before a worker starts, from the files' headers alone; no torch."""

from __future__ import annotations

import math

from infra.errors import ConfigError
from infra.files import read_json
from training.adapter import check_targets
from training.base import CONFIG_NAME
from training.config import FinetuneJob
from training.weights import tensor_specs, weight_files


def count_trained(job: FinetuneJob) -> int:
    """How many parameters are trained. Raises ConfigError for an unknown target layer."""
    specs = [spec for name in weight_files(job.base_dir) for spec in tensor_specs(job.base_dir / name)]
    if job.train.method == "full":
        return sum(math.prod(spec.shape) for spec in specs)
    linear = {spec.name.removesuffix(".weight"): spec.shape for spec in specs if len(spec.shape) == 2 and "embed" not in spec.name}
    linear.pop("lm_head", None)
    lora = job.train.lora
    check_targets(lora.target_modules, linear)
    wanted = [shape for name, shape in linear.items() if name.rpartition(".")[2] in lora.target_modules]
    return sum(lora.rank * (rows + columns) + (rows if lora.use_dora else 0) for rows, columns in wanted)


def check_layout(job: FinetuneJob) -> None:
    """Raises one ConfigError with everything that keeps this base model from being laid over workers as configured."""
    model, train = read_json(job.base_dir / CONFIG_NAME), job.train
    tensor, pipeline = train.parallel.tensor, train.parallel.pipeline
    problems = []
    if tensor > 1:
        sizes = {name: int(model.get(name) or tensor) for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size")}
        problems += [f"{name} {size} cannot be cut into parallel.tensor {tensor}" for name, size in sizes.items() if size % tensor]
        if model.get("mlp_bias") or (model.get("attention_bias") and model.get("model_type") == "llama"):
            problems.append("mlp_bias or attention_bias is set, which a layer with cut inputs does not know: set parallel.tensor 1")
    if (layers := int(model["num_hidden_layers"])) < pipeline:
        problems.append(f"{layers} layers are too few for parallel.pipeline {pipeline}")
    if pipeline > 1 and train.method == "full" and model.get("tie_word_embeddings"):
        problems.append("tie_word_embeddings is set, so two stages would train one tensor: set parallel.pipeline 1 or method lora")
    if train.batch_rows < (groups := train.max_workers // (pipeline * tensor)):
        problems.append(f"batch_rows {train.batch_rows} is less than the {groups} workers that share the rows of a step")
    if problems:
        raise ConfigError(f"{job.base_dir.name} on {train.max_workers} workers:\n" + "\n".join(f"  - {line}" for line in problems))
