"""`python -m training.merge --config F`: base and adapter as one 16-bit model, tensor by tensor.

W' = round(W + scale B A), in fp32 and rounded once to the base's own dtype; every other tensor is copied byte for byte. No more than one
layer's weights are in memory, and nothing is ever merged into quantized weights.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from infra.contracts import Manifest, ModelFacts, verify, write_manifest
from infra.errors import ArtifactError
from infra.files import require_free_space
from infra.process import Progress, run_program
from training.adapter import ADAPTER_NAME, PEFT_PREFIX, adapter_scale
from training.base import CONFIG_NAME
from training.config import MergeJob
from training.folders import fresh_folder
from training.weights import safetensors_writer, tensor_specs, total_bytes, weight_files

COPIED_SUFFIXES = (".json", ".jinja")


def merge(job: MergeJob) -> None:
    """Writes the merged model. Raises ArtifactError where the adapter was not trained on this base or does not fit it."""
    base, adapter = verify(job.base_dir, ("base",)), verify(job.adapter_dir, ("adapter",))
    facts = _checked_facts(base, adapter, job)
    assert facts.adapter is not None
    specs = {name: tensor_specs(job.base_dir / name) for name in weight_files(job.base_dir)}
    size = sum(total_bytes(shard) for shard in specs.values())
    require_free_space(job.output_dir, size, "the merged weights")
    fresh_folder(job.output_dir)
    progress, done = Progress(job.progress_file, "tensors"), 0
    with safe_open(job.adapter_dir / ADAPTER_NAME, framework="pt") as adapter_file:
        updates = adapter_updates(adapter_file.keys(), [spec.name for shard in specs.values() for spec in shard])
        for name, shard in specs.items():
            with (
                safe_open(job.base_dir / name, framework="pt") as weights,
                safetensors_writer(job.output_dir / name, shard, {"format": "pt"}) as writer,
            ):
                for spec in shard:
                    weight = weights.get_tensor(spec.name)
                    if spec.name in updates:
                        a, b = (adapter_file.get_tensor(part) for part in updates[spec.name])
                        weight = merged_weight(weight, a, b, adapter_scale(facts.adapter), spec.name)
                    writer.write(spec.name, weight.contiguous().view(torch.uint8).numpy().data.cast("B"))
                    done += 1
            progress.report(done, sum(len(each) for each in specs.values()))
    _copy_the_rest(job.base_dir, job.output_dir)
    parents = {"base": base.digest, "adapter": adapter.digest}
    write_manifest(job.output_dir, "merged", job.provenance, model=facts.model_copy(update={"adapter": None}), parents=parents)


def merged_weight(weight: Tensor, a: Tensor, b: Tensor, scale: float, name: str) -> Tensor:
    """W (out, in), A (rank, in), B (out, rank) -> W + scale B A in W's dtype. Raises ArtifactError where shapes do not fit."""
    if a.shape[1] != weight.shape[1] or b.shape[0] != weight.shape[0] or a.shape[0] != b.shape[1]:
        shapes = f"weight {tuple(weight.shape)}, A {tuple(a.shape)}, B {tuple(b.shape)}"
        raise ArtifactError(f"{name}: {shapes} do not fit. Train the adapter on this base.")
    return torch.addmm(weight.float(), b.float(), a.float(), alpha=scale).to(weight.dtype)


def adapter_updates(adapter_names: list[str], base_names: list[str]) -> Mapping[str, tuple[str, str]]:
    """Names of A and B by the weight they change. Raises ArtifactError where the adapter has a tensor that changes nothing."""
    updates: dict[str, tuple[str, str]] = {}
    exist = set(base_names)
    for name in adapter_names:
        module = name.removeprefix(PEFT_PREFIX).rpartition(".lora_")[0]
        pair = (f"{PEFT_PREFIX}{module}.lora_A.weight", f"{PEFT_PREFIX}{module}.lora_B.weight")
        if name not in pair or not set(pair) <= set(adapter_names) or f"{module}.weight" not in exist:
            raise ArtifactError(f"adapter tensor {name!r} changes no weight of this base model. Train the adapter on this base.")
        updates[f"{module}.weight"] = pair
    if not updates:
        raise ArtifactError(f"{ADAPTER_NAME} holds no tensors, so merging would silently give the base model. Train the adapter again.")
    return updates


def _checked_facts(base: Manifest, adapter: Manifest, job: MergeJob) -> ModelFacts:
    facts = adapter.model
    if facts is None or facts.adapter is None or facts.base_digest != base.digest:
        trained_on = facts.base_digest if facts else None
        raise ArtifactError(
            f"{job.adapter_dir}: trained on the base model {trained_on}, given is {base.digest} ({job.base_dir}). Merge with its own base."
        )
    return facts


def _copy_the_rest(base_dir: Path, output_dir: Path) -> None:
    assert (base_dir / CONFIG_NAME).is_file()
    for path in base_dir.iterdir():
        if path.suffix in COPIED_SUFFIXES and path.name != "manifest.json":
            shutil.copyfile(path, output_dir / path.name)


if __name__ == "__main__":
    run_program(MergeJob, merge)
