"""`python -m serving.quantize.openvino --config F`: an exported model with small weights, by NNCF.

- INT8: one scale a row, without data. INT4: one scale a group of `group_size` numbers; embeddings and output keep 8 bits.
- `openvino-int4-awq` looks at the activations of training rows: AWQ scales the channels that matter, and each group's scale is the one with
  the least error of the layer's output.
- What the manifest says of the weights is read back from the model that was written, not taken from what was asked.
- Correctness is not judged here: the pipeline compares the answers of this model with those of the adapter.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from infra.contracts import MANIFEST_NAME, Manifest, WeightFacts, verify, write_manifest
from infra.errors import ArtifactError, ConfigError
from infra.files import require_free_space
from infra.process import Progress, peak_rss_bytes, run_program
from serving.engines.memory import giving_back_file_pages
from serving.formats import FormatConfig, QuantizeJob, weight_problems
from serving.quantize.calibration import calibration_inputs
from serving.quantize.export import MODEL_NAME, empty, export_model, read_merged, silence_libraries, weights_bytes
from serving.weights import read_openvino_weights

WEIGHTS_NAME = "openvino_model.bin"
DATA_AWARE_METHODS = ("awq", "scale_estimation")
NUM_STAGES = 4


def quantize(job: QuantizeJob) -> None:
    """Writes the quantized model of `job.merged_dir` into `job.output_dir`.

    Raises ArtifactError when what it starts from is not what its manifest says, ConfigError when OpenVINO cannot take it, when the group
    size does not divide the model's sizes or when the disk is full.
    """
    progress = Progress(job.progress_file, "stages")
    merged = read_merged(job.merged_dir)
    assert merged.model is not None
    require_free_space(job.output_dir, 3 * weights_bytes(merged), "the 32-bit export and the quantized model")
    parents = {"merged": merged.digest}
    if job.quantize.calibration_rows is not None:
        parents["tokens"] = _verify_tokens(job).digest
    empty(job.output_dir)
    progress.report(1, NUM_STAGES)
    with tempfile.TemporaryDirectory(dir=job.output_dir) as scratch:
        exported = _exported(job, merged.digest, Path(scratch))
        progress.report(2, NUM_STAGES)
        copy_all_but_model(exported, job.output_dir)
        # Looking at activations compiles a second copy of the 32-bit weights: 1.56 GB at the peak for the 135M model, with this about 1.0.
        with giving_back_file_pages():
            model = compress(exported / MODEL_NAME, job.quantize, job.tokens_dir)
            write_model(model, job.output_dir / MODEL_NAME, job.quantize)
        del model  # before its source is gone
    progress.report(3, NUM_STAGES)
    facts = merged.model.model_copy(update={"quantization": job.quantize.format, "weights": written_weights(job.output_dir, job.quantize)})
    write_manifest(job.output_dir, "quantized", job.provenance, facts, parents)
    progress.report(NUM_STAGES, NUM_STAGES, peak_gb=peak_rss_bytes() / 1e9)


def _verify_tokens(job: QuantizeJob) -> Manifest:
    if job.tokens_dir is None:
        raise ConfigError(f"{job.quantize.format} looks at training rows, and tokens_dir names none. Name the folder of the step `render`.")
    return verify(job.tokens_dir, ("tokens",))


def _exported(job: QuantizeJob, merged_digest: str, scratch: Path) -> Path:
    """The folder of the export to start from, after checking that it is one of this very model."""
    if job.exported_dir is None:
        silence_libraries()
        export_model(job.merged_dir, scratch)
        return scratch
    if (found := verify(job.exported_dir, ("exported",)).parents.get("merged")) != merged_digest:
        raise ArtifactError(
            f"{job.exported_dir}: exported from a model with digest {found}, {job.merged_dir} has {merged_digest}. Export this model."
        )
    return job.exported_dir


def copy_all_but_model(source: Path, target: Path) -> None:
    """The tokenizer's files and the model's config."""
    for path in source.iterdir():
        if path.is_file() and path.name not in (MODEL_NAME, WEIGHTS_NAME, MANIFEST_NAME):
            shutil.copyfile(path, target / path.name)


def compress(source: Path, config: FormatConfig, tokens_dir: Path | None) -> Any:
    """The IR at `source` with its weight matrices as the format has them. Raises ConfigError on a group size that divides no row."""
    # NNCF 3.4 compiles one small graph for each of the 211 weights, because its cache key lacks __eq__ and never hits:
    # 14.9 s, against 4.4 s on numpy with the same bytes as result.
    os.environ["NNCF_DISABLE_OPTIMIZED_COMPRESSION"] = "1"
    import nncf
    import openvino

    nncf.set_log_level(logging.ERROR)
    model = openvino.Core().read_model(source)
    if config.format == "bf16":
        return model
    try:
        return nncf.compress_weights(model, **nncf_options(config, model, tokens_dir))
    except nncf.InvalidGroupSizeError as error:
        raise ConfigError(f"quantize.group_size is {config.group_size}: {error}. Choose one that divides the model's sizes.") from error


def nncf_options(config: FormatConfig, model: Any, tokens_dir: Path | None) -> dict[str, Any]:
    """NNCF's own settings of a format."""
    import nncf

    if config.group_size is None:
        return {"mode": nncf.CompressWeightsMode.INT8_ASYM}
    options = {"mode": nncf.CompressWeightsMode.INT4_ASYM, "ratio": config.int4_share, "group_size": config.group_size}
    if config.calibration_rows is None:
        return options
    assert tokens_dir is not None
    rows = calibration_inputs(tokens_dir, config.calibration_rows, {name for port in model.inputs for name in port.names})
    return {**options, "dataset": nncf.Dataset(rows), "subset_size": len(rows), "awq": True, "scale_estimation": True}


def write_model(model: Any, target: Path, config: FormatConfig) -> None:
    """The model as two files."""
    import openvino

    openvino.save_model(model, target, compress_to_fp16=config.format == "bf16")


def written_weights(folder: Path, config: FormatConfig) -> WeightFacts:
    """What the written model says of its weights. Raises ArtifactError where that is not what was asked."""
    found = read_openvino_weights(folder)
    if config.calibration_rows is not None:
        found = found.model_copy(update={"methods": DATA_AWARE_METHODS, "calibration_rows": config.calibration_rows})
    if problems := weight_problems(found, config):
        raise ArtifactError(f"{folder}: {config.format} was asked for; {'; '.join(problems)}. Choose another format or group size.")
    return found


if __name__ == "__main__":
    run_program(QuantizeJob, quantize)
