"""Makes the merged model small for OpenVINO: weights in INT8, per channel, without data.

- The engine takes token ids; the OpenVINO tokenizer beside the model only tells its grammar compiler the vocabulary.
- The tokenizer and template files are copied byte by byte, so encoding stays what it was in training.
- Correctness is not judged here: the pipeline compares the answers of this model with those of the adapter.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

from infra.contracts import verify, write_manifest
from infra.errors import ArtifactError, ConfigError
from infra.files import require_free_space
from infra.process import Progress, run_program
from serving.config import QuantizeJob

MODEL_NAME = "openvino_model.xml"
TOKENIZER_NAMES = ("openvino_tokenizer.xml", "openvino_detokenizer.xml")
TASK = "text-generation-with-past"
COPIED_NAMES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
NUM_STAGES = 5


def quantize(job: QuantizeJob) -> None:
    """Writes the quantized model of `job.merged_dir` into `job.output_dir`.

    Raises ArtifactError when the merged model is not what its manifest says, ConfigError when OpenVINO cannot take it or the disk is full.
    """
    progress = Progress(job.progress_file, "stages")
    merged = verify(job.merged_dir, ("merged", "base"))
    if merged.model is None:
        raise ArtifactError(f"{job.merged_dir}: its manifest holds no model facts. Run the step that makes it again.")
    weights_bytes = sum(entry.size_bytes for entry in merged.files.values())
    require_free_space(job.output_dir, 3 * weights_bytes, "the 32-bit export and the quantized model")
    progress.report(1, NUM_STAGES)
    _empty(job.output_dir)
    _silence_libraries()
    with tempfile.TemporaryDirectory(dir=job.output_dir) as scratch:
        exported = Path(scratch) / MODEL_NAME
        _export(job.merged_dir, exported)
        progress.report(3, NUM_STAGES)
        _compress(exported, job.output_dir / MODEL_NAME)
    progress.report(4, NUM_STAGES)
    for name in COPIED_NAMES:
        if (job.merged_dir / name).is_file():
            shutil.copyfile(job.merged_dir / name, job.output_dir / name)
    _export_tokenizer(job.output_dir)
    facts = merged.model.model_copy(update={"quantization": job.quantize.format})
    write_manifest(job.output_dir, "quantized", job.provenance, facts, {"merged": merged.digest})
    progress.report(NUM_STAGES, NUM_STAGES)


def _empty(folder: Path) -> None:
    """Removes what a killed attempt left; an export is not resumed."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _silence_libraries() -> None:
    """Keeps the libraries' tables, bars and tracer warnings out of the log, and picks NNCF's faster path."""
    # NNCF 3.4 compiles one small graph for each of the 211 weights, because its cache key lacks __eq__ and never hits:
    # 14.9 s, against 4.4 s on numpy with the same bytes as result.
    os.environ["NNCF_DISABLE_OPTIMIZED_COMPRESSION"] = "1"
    warnings.simplefilter("ignore")
    import nncf
    from transformers.utils import logging as transformers_logging

    nncf.set_log_level(logging.ERROR)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def _export(model_dir: Path, target: Path) -> None:
    """The model as OpenVINO IR with 32-bit weights, key-value cache inside. Raises ConfigError on an architecture optimum-intel lacks."""
    import optimum.exporters.openvino.model_configs  # noqa: F401 - fills the table that TasksManager reads
    import torch
    from optimum.exporters.openvino import utils as export_options
    from optimum.exporters.openvino.convert import export
    from optimum.exporters.tasks import TasksManager
    from transformers import AutoModelForCausalLM

    # 32 bits hold every 16-bit weight exactly; half precision would round them before they are quantized.
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, use_safetensors=True, local_files_only=True)
    model_type = model.config.model_type
    # The tracer would run the model twice more to compare; the pipeline compares the answers themselves.
    export_options.SKIP_CHECK_TRACE_MODELS = (*export_options.SKIP_CHECK_TRACE_MODELS, model_type)
    try:
        make_config: Any = TasksManager.get_exporter_config_constructor(
            model=model, exporter="openvino", task=TASK, library_name="transformers"
        )
    except (KeyError, ValueError) as error:
        raise ConfigError(
            f"{model_dir}: optimum-intel has no export of {model_type!r} models: {error}. Choose another base model."
        ) from error
    export(model, make_config(model.config, use_past=True, use_past_in_inputs=True), target, stateful=True)


def _export_tokenizer(folder: Path) -> None:
    """The tokenizer of `folder` in OpenVINO's form. Raises ConfigError on a kind of tokenizer that openvino-tokenizers lacks."""
    import openvino
    from openvino_tokenizers import convert_tokenizer
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    try:
        models = convert_tokenizer(tokenizer, with_detokenizer=True)
    except Exception as error:  # a library's edge: whatever it raises, it means that it cannot convert this one
        raise ConfigError(f"{folder}: openvino-tokenizers cannot convert this tokenizer: {error}. Choose another base model.") from error
    for model, name in zip(models, TOKENIZER_NAMES, strict=True):
        openvino.save_model(model, folder / name)


def _compress(source: Path, target: Path) -> None:
    """The IR at `source` with all weight matrices in asymmetric INT8, one scale a row."""
    import nncf
    import openvino

    model = openvino.Core().read_model(source)
    compressed = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_ASYM)
    openvino.save_model(compressed, target, compress_to_fp16=False)


if __name__ == "__main__":
    run_program(QuantizeJob, quantize)
