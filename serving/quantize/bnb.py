"""`python -m serving.quantize.bnb --config F`: the merged model with linear layers in INT8 or NF4 by bitsandbytes, for the engine `torch`.

Embeddings and output keep their 16 bits. What is written is quantized already, so a server reads few bytes and computes nothing anew.
"""

from __future__ import annotations

from typing import Any

from infra.contracts import WeightFacts, write_manifest
from infra.errors import ArtifactError
from infra.files import read_json, require_free_space, write_json_atomic
from infra.process import Progress, peak_rss_bytes, run_program
from serving.formats import QuantizeJob, weight_problems
from serving.quantize.export import copy_tokenizer, empty, read_merged, silence_libraries, weights_bytes
from serving.weights import read_bnb_weights

CONFIG_NAME = "config.json"
NUM_STAGES = 3


def quantize(job: QuantizeJob) -> None:
    """Writes the quantized model of `job.merged_dir` into `job.output_dir`.

    Raises ArtifactError when the merged model is not what its manifest says, ConfigError when the disk is full.
    """
    progress = Progress(job.progress_file, "stages")
    merged = read_merged(job.merged_dir)
    assert merged.model is not None
    require_free_space(job.output_dir, weights_bytes(merged), "the quantized model")
    empty(job.output_dir)
    progress.report(1, NUM_STAGES)
    silence_libraries()
    _write_weights(job)
    _copy_the_rest(job)
    progress.report(2, NUM_STAGES)
    facts = merged.model.model_copy(update={"quantization": job.quantize.format, "weights": _written_weights(job)})
    write_manifest(job.output_dir, "quantized", job.provenance, facts, {"merged": merged.digest})
    progress.report(NUM_STAGES, NUM_STAGES, peak_gb=peak_rss_bytes() / 1e9)


def _write_weights(job: QuantizeJob) -> None:
    """The quantized weights, and a config.json of transformers' own making that says how to read them."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        job.merged_dir,
        dtype="auto",  # what is not quantized stays as it is
        quantization_config=_bnb_config(job.quantize.format),
        use_safetensors=True,
        local_files_only=True,
        device_map="cpu",
    )
    model.save_pretrained(job.output_dir)


def _copy_the_rest(job: QuantizeJob) -> None:
    """All else as the merged model has it: transformers would write its defaults, and newer names, into the configuration."""
    told = read_json(job.output_dir / CONFIG_NAME)["quantization_config"]
    copy_tokenizer(job.merged_dir, job.output_dir)
    config = read_json(job.output_dir / CONFIG_NAME)
    write_json_atomic(job.output_dir / CONFIG_NAME, {**config, "quantization_config": told})


def _bnb_config(weight_format: str) -> Any:
    from transformers import BitsAndBytesConfig

    if weight_format == "bnb-int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)


def _written_weights(job: QuantizeJob) -> WeightFacts:
    found = read_bnb_weights(job.output_dir)
    if problems := weight_problems(found, job.quantize):
        raise ArtifactError(f"{job.output_dir}: {job.quantize.format} was asked for; {'; '.join(problems)}.")
    return found


if __name__ == "__main__":
    run_program(QuantizeJob, quantize)
