"""`python -m training.base --config F`: a base model as a checked folder of safetensors, tokenizer and chat template."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from infra.chat import TEMPLATE_NAME, TOKENIZER_CONFIG_NAME, TOKENIZER_NAME, load_codec
from infra.contracts import ModelFacts, write_manifest
from infra.errors import ArtifactError, ConfigError
from infra.files import read_json, require_free_space, sha256_file, sha256_json, write_json_atomic, write_text_atomic
from infra.models import locate
from infra.process import run_program
from training.config import BaseJob
from training.folders import fresh_folder
from training.gguf import llama_config, read_gguf, write_llama_weights
from training.gguf_tokenizer import write_tokenizer
from training.weights import INDEX_NAME, SINGLE_NAME, tensor_specs, weight_files

CONFIG_NAME = "config.json"
GENERATION_NAME = "generation_config.json"
BYTES_PER_GGUF_BYTE = 4  # four-bit blocks become 16-bit weights


def prepare_base(job: BaseJob) -> None:
    """Writes the base model named by the job. Raises ConfigError saying what is missing or unsafe about the source."""
    found = locate(job.source)
    fresh_folder(job.output_dir)
    if found.is_file():
        _convert_gguf(found, job.output_dir)
    else:
        _copy_folder(found, job.output_dir)
    write_manifest(job.output_dir, "base", job.provenance, model=model_facts(job.output_dir, job.source))


def model_facts(folder: Path, source: str) -> ModelFacts:
    """The facts of a base model's folder. Raises ConfigError where it names no stop token or no context length."""
    config, codec = read_json(folder / CONFIG_NAME), load_codec(folder)
    return ModelFacts(
        base_model=source,
        base_digest=sha256_json({name: sha256_file(folder / name) for name in weight_files(folder)}),
        tokenizer_digest=sha256_file(folder / TOKENIZER_NAME),
        chat_template_digest=codec.template_digest,
        special_tokens=dict(codec.special_tokens),
        context_tokens=_context_tokens(folder, config),
        stop_ids=_stop_ids(folder, config),
    )


def _convert_gguf(path: Path, folder: Path) -> None:
    require_free_space(folder, path.stat().st_size * BYTES_PER_GGUF_BYTE, f"the 16-bit weights of {path.name}")
    gguf = read_gguf(path)
    config = llama_config(gguf)
    write_tokenizer(gguf, folder)
    write_llama_weights(gguf, config, folder / SINGLE_NAME)
    write_json_atomic(folder / CONFIG_NAME, config)
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    write_json_atomic(folder / GENERATION_NAME, ids)


def _copy_folder(source: Path, folder: Path) -> None:
    names = weight_files(source)
    _check_folder(source)
    require_free_space(folder, sum((source / name).stat().st_size for name in names), f"the weights of {source}")
    try:
        codec = load_codec(source)
        for name in names:
            tensor_specs(source / name)
    except ArtifactError as error:
        raise ConfigError(error.message) from error
    optional = [name for name in (INDEX_NAME, GENERATION_NAME) if (source / name).is_file()]
    for name in [*names, CONFIG_NAME, TOKENIZER_NAME, TOKENIZER_CONFIG_NAME, *optional]:
        shutil.copyfile(source / name, folder / name)
    write_text_atomic(folder / TEMPLATE_NAME, codec.template_text)


def _check_folder(source: Path) -> None:
    for name in (TOKENIZER_NAME, TOKENIZER_CONFIG_NAME):
        if not (source / name).is_file():
            raise ConfigError(f"{source}: no {name}. A fast tokenizer is needed: save it with transformers' `save_pretrained` first.")
    config = _foreign_json(source / CONFIG_NAME)
    if "auto_map" in config:
        raise ConfigError(f"{source}: {CONFIG_NAME} asks for code of its own ('auto_map'), which is never run. Choose another base model.")
    if "quantization_config" in config:
        raise ConfigError(f"{source}: already quantized. An adapter is trained and merged on 16-bit weights; name those.")


def _foreign_json(path: Path) -> Any:
    try:
        return read_json(path)
    except ArtifactError as error:
        raise ConfigError(error.message) from error


def _context_tokens(folder: Path, config: dict[str, Any]) -> int:
    context = config.get("max_position_embeddings")
    if not isinstance(context, int):
        raise ConfigError(f"{folder}: 'max_position_embeddings' is {context!r} in {CONFIG_NAME}; the context length is needed there.")
    return context


def _stop_ids(folder: Path, config: dict[str, Any]) -> tuple[int, ...]:
    generation = read_json(folder / GENERATION_NAME) if (folder / GENERATION_NAME).is_file() else {}
    found = generation.get("eos_token_id", config.get("eos_token_id"))
    ids = found if isinstance(found, list) else [found]
    if not ids or not all(isinstance(item, int) for item in ids):
        raise ConfigError(f"{folder}: 'eos_token_id' is {found!r}; the token that ends an answer is needed in {GENERATION_NAME}.")
    return tuple(ids)


if __name__ == "__main__":
    run_program(BaseJob, prepare_base)
