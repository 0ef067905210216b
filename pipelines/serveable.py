"""Whether what a spec would train could be served: asked as soon as the base model's config can be read, before anything is trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from infra import models
from infra.answers import read_prompts
from infra.contracts import MANIFEST_NAME, read_manifest, verify
from infra.errors import ArtifactError, ConfigError
from infra.files import read_json
from infra.model_sizes import dividing, head_size, row_sizes
from pipelines.spec import Spec
from serving.formats import INT4_FORMATS
from serving.limits import ENGINE_OF_FORMAT, cache_tokens, model_problems
from training.config import KNOWN_MODEL_TYPES

CONFIG_NAME = "config.json"
Check = Callable[[Path], None]


def check_source(spec: Spec) -> None:
    """Checks the base model where its config.json lies on this machine already; a `.gguf` file or the hub's wait for the step `base`."""
    if not models.is_remote(spec.base_model) and (found := models.locate(spec.base_model)).is_dir():
        check_base(spec, found)


def check_base(spec: Spec, folder: Path) -> None:
    """Raises one ConfigError with everything that keeps the model in `folder` from being trained and served as the spec says."""
    config = read_json(folder / CONFIG_NAME)
    if not isinstance(config, dict):
        raise ConfigError(f"{folder / CONFIG_NAME}: holds a {type(config).__name__}, an object is needed. Fetch the model again.")
    model_type = config.get("model_type")
    problems = [line for engine in _engines(spec) for line in model_problems(engine, model_type)]
    if model_type not in KNOWN_MODEL_TYPES:
        problems.append(f"the trainer cannot train model type {model_type!r}; it knows {', '.join(KNOWN_MODEL_TYPES)}")
    elif not problems:
        problems += _length_problems(spec, config)
        problems += _group_problems(spec, config)
    problems += _draft_problems(spec, folder)
    _refuse(problems, f"base model {spec.base_model!r}")


def check_prompts(spec: Spec, base_dir: Path, tokens_dir: Path) -> None:
    """Raises ConfigError where the longest held-out prompt and its answer are more than the served model can hold."""
    longest = max((len(prompt.ids) for prompt in read_prompts(tokens_dir)), default=0)
    needed = longest + spec.evaluate.max_new_tokens
    holds = _served_tokens(spec, read_json(base_dir / CONFIG_NAME))
    too_long = f"the longest held-out prompt has {longest} tokens and evaluate.max_new_tokens is {spec.evaluate.max_new_tokens}, which is "
    _refuse(
        [
            f"{too_long}{needed} together; {name} {size}. {advice} or evaluate.max_new_tokens"
            for name, size, advice in holds
            if needed > size
        ],
        "held-out rows",
    )


def check_engines(spec: Spec) -> None:
    """Raises ConfigError where an engine that the spec names reads not every candidate, one of which this run will serve."""
    serve, formats = spec.serve, spec.quantize.formats
    named = serve.engine if "engine" in serve.model_fields_set else None
    pools = [pool.engine or named for pool in serve.pools if pool.model_dir is None]
    asked = {engine for engine in (pools if serve.pools else [named]) if engine is not None}
    unread = {engine: [each for each in formats if ENGINE_OF_FORMAT[each] != engine] for engine in sorted(asked)}
    if wrong := [f"serve.engine is {engine!r}, which does not read {', '.join(names)}" for engine, names in unread.items() if names]:
        engines = " or ".join(repr(engine) for engine in _engines(spec))
        readable = ", ".join(name for name, engine in ENGINE_OF_FORMAT.items() if engine in asked)
        raise ConfigError(
            f"{'; '.join(wrong)}, and that is what this run may serve. Leave serve.engine out, so that it is the one that reads what was "
            f"chosen ({engines}), or name only formats in quantize.formats that it reads (of {readable})."
        )


def _engines(spec: Spec) -> list[str]:
    """The engines that read the candidates."""
    return sorted({ENGINE_OF_FORMAT[each] for each in spec.quantize.formats})


def _group_problems(spec: Spec, config: Mapping[str, Any]) -> list[str]:
    """Rows that do not fall into whole groups, which NNCF refuses after the model has been trained."""
    group, wanted = spec.quantize.group_size, [each for each in spec.quantize.formats if each in INT4_FORMATS]
    sizes = row_sizes(config)
    if not wanted or not (uneven := sorted(size for size in sizes if size % group)):
        return []
    fitting = dividing((128, 96, 64, 48, 32, 16), sizes)
    advice = f"Set it to {' or '.join(map(str, fitting))}" if fitting else f"Take {', '.join(wanted)} out of quantize.formats"
    return [f"quantize.group_size is {group}, which does not divide the model's rows of {', '.join(map(str, uneven))}. {advice}"]


def _length_problems(spec: Spec, config: Mapping[str, Any]) -> list[str]:
    problems = []
    for name, size, advice in _served_tokens(spec, config):
        if (wanted := spec.data.max_tokens or 0) > size:
            problems.append(f"data.max_tokens is {wanted}; {name} {size}. {advice}")
        if (wanted := spec.evaluate.max_new_tokens) >= size:
            problems.append(f"evaluate.max_new_tokens is {wanted}; {name} {size}, prompt and answer together. Lower it")
    return problems


def _draft_problems(spec: Spec, folder: Path) -> list[str]:
    """What is wrong with the small model that would guess for this one; its tokenizer is compared once the base is an artifact."""
    if spec.serve.speculative is None or spec.serve.speculative.draft_model_dir is None:
        return []
    name = "serve.speculative.draft_model_dir"
    try:
        draft = verify(spec.serve.speculative.draft_model_dir, ("quantized",)).model
        own = read_manifest(folder).model if (folder / MANIFEST_NAME).is_file() else None
    except ArtifactError as error:
        return [f"{name}: {error.message.rstrip('.')}"]
    if own is not None and (draft is None or draft.tokenizer_digest != own.tokenizer_digest):
        return [f"{name}: its tokenizer is another than that of the base. Name a small model of the same family, or use prompt_lookup"]
    return []


def _served_tokens(spec: Spec, config: Mapping[str, Any]) -> list[tuple[str, int, str]]:
    """What bounds the tokens of one request: its name, how many, and what to do about it."""
    found = []
    if isinstance(context := config.get("max_position_embeddings"), int):
        found.append(("the model's context holds", context, "Lower data.max_tokens"))
    bounds = [cache_tokens(engine, _cached_values_per_token(config), spec.serve.cache_gb) for engine in _engines(spec)]
    if cached := min((each for each in bounds if each is not None), default=None):
        found.append((f"serve.cache_gb {spec.serve.cache_gb:g} holds at most", cached, "Raise serve.cache_gb, lower data.max_tokens"))
    return found


def _cached_values_per_token(config: Mapping[str, Any]) -> int:
    """Numbers in the KV cache for one token: keys and values of every layer and head that has its own."""
    heads = config["num_attention_heads"]
    values: int = 2 * config["num_hidden_layers"] * (config.get("num_key_value_heads") or heads) * head_size(config)
    return values


def _refuse(problems: list[str], what: str) -> None:
    if problems:
        raise ConfigError(f"{what}: what would be trained could not be served\n" + "\n".join(f"  - {line}." for line in problems))
