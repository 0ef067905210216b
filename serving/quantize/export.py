"""`python -m serving.quantize.export --config F`: the merged model as OpenVINO reads it, with the weights still whole.

- It is the slow part of every OpenVINO format, and the same for all of them.
- The engine takes token ids; the OpenVINO tokenizer beside the model only tells its grammar compiler the vocabulary.
- The tokenizer and template files are copied byte by byte, so encoding stays what it was in training.
"""

from __future__ import annotations

import logging
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

from infra.contracts import Manifest, verify, write_manifest
from infra.errors import ArtifactError, ConfigError
from infra.files import require_free_space
from infra.process import Progress, run_program
from serving.formats import ExportJob

MODEL_NAME = "openvino_model.xml"
TOKENIZER_NAMES = ("openvino_tokenizer.xml", "openvino_detokenizer.xml")
TASK = "text-generation-with-past"
COPIED_NAMES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
NUM_STAGES = 3


def export(job: ExportJob) -> None:
    """Writes the export of `job.merged_dir` into `job.output_dir`.

    Raises ArtifactError when the merged model is not what its manifest says, ConfigError when OpenVINO cannot take it or the disk is full.
    """
    progress = Progress(job.progress_file, "stages")
    merged = read_merged(job.merged_dir)
    require_free_space(job.output_dir, 2 * weights_bytes(merged), "the 32-bit export")
    empty(job.output_dir)
    silence_libraries()
    progress.report(1, NUM_STAGES)
    export_model(job.merged_dir, job.output_dir)
    progress.report(2, NUM_STAGES)
    write_manifest(job.output_dir, "exported", job.provenance, merged.model, {"merged": merged.digest})
    progress.report(NUM_STAGES, NUM_STAGES)


def read_merged(folder: Path) -> Manifest:
    """The manifest of a model that can be quantized, after checking its files. Raises ArtifactError."""
    merged = verify(folder, ("merged", "base"))
    if merged.model is None:
        raise ArtifactError(f"{folder}: its manifest holds no model facts. Run the step that makes it again.")
    return merged


def weights_bytes(manifest: Manifest) -> int:
    """Size of an artifact, in which weights outweigh all else."""
    return sum(entry.size_bytes for entry in manifest.files.values())


def empty(folder: Path) -> None:
    """Removes what a killed attempt left; neither an export nor a quantization is resumed."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def silence_libraries() -> None:
    """Keeps the libraries' bars and tracer warnings out of the log."""
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    warnings.simplefilter("ignore")
    from transformers.utils import logging as transformers_logging

    logging.getLogger("nncf").setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def copy_tokenizer(source: Path, target: Path) -> None:
    """The files by which text becomes tokens, and the model's config, as they are."""
    for name in COPIED_NAMES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def export_model(model_dir: Path, target: Path) -> None:
    """The model of a folder and its tokenizer, in OpenVINO's form. Raises ConfigError on what its exporters lack."""
    _export_graph(model_dir, target / MODEL_NAME)
    copy_tokenizer(model_dir, target)
    _export_tokenizer(target)


def _export_graph(model_dir: Path, target: Path) -> None:
    """The model as OpenVINO IR with 32-bit weights, key-value cache inside. Raises ConfigError on an architecture optimum-intel lacks."""
    import optimum.exporters.openvino.model_configs  # noqa: F401 - fills the table that TasksManager reads
    import torch
    from optimum.exporters.openvino import utils as export_options
    from optimum.exporters.openvino.convert import export as export_to_openvino
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
    export_to_openvino(model, make_config(model.config, use_past=True, use_past_in_inputs=True), target, stateful=True)


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


if __name__ == "__main__":
    run_program(ExportJob, export)
