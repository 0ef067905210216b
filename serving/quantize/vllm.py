"""`python -m serving.quantize.vllm --config F`: the merged model as vLLM reads it, every weight as it is, in a folder of its own.

What a run proves and promotes is such a folder, sealed by itself; its files are the merged model's own, linked where the disk can.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from infra.contracts import write_manifest
from infra.errors import ConfigError
from infra.files import require_free_space
from infra.process import Progress, run_program
from serving.formats import QuantizeJob, weight_problems
from serving.quantize.export import empty, read_merged, weights_bytes
from serving.weights import read_plain_weights

NUM_STAGES = 2


def quantize(job: QuantizeJob) -> None:
    """Writes the model of `job.merged_dir` into `job.output_dir`.

    Raises ArtifactError when the merged model is not what its manifest says, ConfigError when its weights have not 16 bits or the disk is
    full.
    """
    progress = Progress(job.progress_file, "stages")
    merged = read_merged(job.merged_dir)
    assert merged.model is not None
    weights = read_plain_weights(job.merged_dir)
    if problems := weight_problems(weights, job.quantize):
        raise ConfigError(f"{job.merged_dir}: {'; '.join(problems)}. Take {job.quantize.format} out of quantize.formats.")
    require_free_space(job.output_dir, weights_bytes(merged), "a copy of the merged model")
    empty(job.output_dir)
    progress.report(1, NUM_STAGES)
    for name in merged.files:
        (job.output_dir / name).parent.mkdir(parents=True, exist_ok=True)
        _link(job.merged_dir / name, job.output_dir / name)
    facts = merged.model.model_copy(update={"quantization": job.quantize.format, "weights": weights})
    write_manifest(job.output_dir, "quantized", job.provenance, facts, {"merged": merged.digest})
    progress.report(NUM_STAGES, NUM_STAGES)


def _link(source: Path, target: Path) -> None:
    """The same file under another name, or a copy where the disk has no such thing; nothing ever writes into an artifact."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


if __name__ == "__main__":
    run_program(QuantizeJob, quantize)
