"""`python -m training.merge --config F`: base and adapter as one 16-bit model, tensor by tensor.

W' = round(W + scale B A), in fp32 and rounded once to the base's own dtype; with DoRA each row of the sum is first brought to its learnt
norm. Every other tensor is copied byte for byte. No more than one layer's weights are in memory, and nothing is ever merged into
quantized weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from safetensors import safe_open
from torch import Tensor

from infra.contracts import Manifest, ModelFacts, verify, write_manifest
from infra.errors import ArtifactError
from infra.files import require_free_space
from infra.process import Progress, run_program
from training.adapter import ADAPTER_NAME, PEFT_PREFIX
from training.config import MergeJob
from training.folders import copy_texts, fresh_folder
from training.weights import safetensors_writer, tensor_specs, total_bytes, weight_files


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
        base_names = [spec.name for shard in specs.values() for spec in shard]
        updates = adapter_updates(adapter_file.keys(), base_names, facts.adapter.use_dora)
        for name, shard in specs.items():
            with (
                safe_open(job.base_dir / name, framework="pt") as weights,
                safetensors_writer(job.output_dir / name, shard, {"format": "pt"}) as writer,
            ):
                for spec in shard:
                    weight = weights.get_tensor(spec.name)
                    if spec.name in updates:
                        parts = [adapter_file.get_tensor(part) for part in updates[spec.name]]
                        weight = merged_weight(weight, parts, facts.adapter.scale, spec.name)
                    writer.write(spec.name, weight.contiguous().view(torch.uint8).numpy().data.cast("B"))
                    done += 1
            progress.report(done, sum(len(each) for each in specs.values()))
    copy_texts(job.base_dir, job.output_dir)
    parents = {"base": base.digest, "adapter": adapter.digest}
    write_manifest(job.output_dir, "merged", job.provenance, model=facts.model_copy(update={"adapter": None}), parents=parents)


def merged_weight(weight: Tensor, parts: Sequence[Tensor], scale: float, name: str) -> Tensor:
    """W (out, in) and the parts A (rank, in), B (out, rank) and perhaps norms m (out) -> V = W + scale B A, or m V / |V|, in W's dtype.

    Raises ArtifactError where shapes do not fit.
    """
    a, b, *norms = parts
    if a.shape[1] != weight.shape[1] or b.shape[0] != weight.shape[0] or a.shape[0] != b.shape[1]:
        shapes = f"weight {tuple(weight.shape)}, A {tuple(a.shape)}, B {tuple(b.shape)}"
        raise ArtifactError(f"{name}: {shapes} do not fit. Train the adapter on this base.")
    total = weight.to(torch.float32, copy=True).addmm_(b.float(), a.float(), alpha=scale)
    if norms:
        total *= (norms[0].float() / total.norm(dim=1))[:, None]
    return total.to(weight.dtype)


def adapter_updates(adapter_names: Sequence[str], base_names: Sequence[str], use_dora: bool) -> Mapping[str, tuple[str, ...]]:
    """Names of A, B and perhaps the norms by the weight they change.

    Raises ArtifactError where the adapter has a tensor that changes nothing, or lacks one.
    """
    updates: dict[str, tuple[str, ...]] = {}
    exist, present = set(base_names), set(adapter_names)
    for name in adapter_names:
        module = name.removeprefix(PEFT_PREFIX).rpartition(".lora_")[0]
        stem = f"{PEFT_PREFIX}{module}.lora_"
        parts = (f"{stem}A.weight", f"{stem}B.weight", *([f"{stem}magnitude_vector"] if use_dora else []))
        if name not in parts or not set(parts) <= present or f"{module}.weight" not in exist:
            raise ArtifactError(f"adapter tensor {name!r} changes no weight of this base model. Train the adapter on this base.")
        updates[f"{module}.weight"] = parts
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


if __name__ == "__main__":
    run_program(MergeJob, merge)
