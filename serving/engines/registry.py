"""The engines by name: the one place that knows which module makes which; a module is imported only when its engine is wanted."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import cast

from infra.contracts import Kind, Manifest, verify
from infra.errors import ConfigError
from serving.config import EngineName, ServeConfig, SpeculationKind
from serving.engines.base import Engine
from serving.limits import ENGINE_OF_FORMAT
from serving.weights import check_weights

MODULES: dict[EngineName, str] = {
    "openvino": "serving.engines.openvino",
    "torch": "serving.engines.torch",
    "vllm": "serving.engines.vllm",
}
MODEL_KINDS: dict[EngineName, tuple[Kind, ...]] = {
    "openvino": ("quantized",),
    "torch": ("merged", "base", "quantized"),
    "vllm": ("merged", "base", "quantized"),
}
"""The kinds of artifact that an engine reads."""
SPECULATION_KINDS: dict[EngineName, tuple[SpeculationKind, ...]] = {
    "openvino": ("prompt_lookup", "draft"),
    "torch": ("prompt_lookup",),
    "vllm": ("prompt_lookup", "draft"),
}
"""How an engine can guess tokens ahead."""


def verify_model(model_dir: Path, config: ServeConfig) -> Manifest:
    """The manifest of a model that the engine reads, after checking its files, and the small model's where one guesses for it.

    Raises ArtifactError where a folder is not what its manifest says, ConfigError where the engine does not read its weights or cannot
    guess so.
    """
    manifest = verify(model_dir, MODEL_KINDS[config.engine])
    require_readable(model_dir, manifest, config)
    check_weights(model_dir, manifest)
    if config.speculative is None:
        return manifest
    if config.adapters:
        raise ConfigError("serve.speculative and serve.adapters are both set; no engine is trusted with both yet. Leave one of them out.")
    kind, draft_dir, known = config.speculative.kind, config.speculative.draft_model_dir, SPECULATION_KINDS[config.engine]
    if kind not in known:
        raise ConfigError(
            f"serve.speculative.kind is {kind!r}; the engine {config.engine!r} has {', '.join(known)}. Use that, or another engine."
        )
    if draft_dir is not None:
        draft = verify(draft_dir, MODEL_KINDS[config.engine])
        if (found := _tokenizer(draft)) != (needed := _tokenizer(manifest)):
            raise ConfigError(
                f"serve.speculative.draft_model_dir {str(draft_dir)!r}: its tokenizer has sha256 {found}, that of the model {needed}; "
                "a model that guesses for another needs the same. Name one of its family, or use prompt_lookup."
            )
    return manifest


def require_readable(model_dir: Path, manifest: Manifest, config: ServeConfig) -> None:
    """Raises ConfigError where quantized weights are of a format that another engine reads, or would be quantized twice."""
    weight_format = manifest.weight_format
    if manifest.kind != "quantized" or weight_format is None:
        return
    if (needed := ENGINE_OF_FORMAT.get(weight_format)) != config.engine:
        raise ConfigError(
            f"{model_dir}: its weights are {weight_format}, which the engine {config.engine!r} does not read. "
            + (f"Set serve.engine to {needed!r}, or leave it out." if needed else f"Known are {', '.join(ENGINE_OF_FORMAT)}.")
        )
    if config.weights != "full":
        raise ConfigError(
            f"serve.weights is {config.weights!r}, and {model_dir} holds {weight_format} already. Set it to 'full', or leave it out."
        )


def _tokenizer(manifest: Manifest) -> str | None:
    return manifest.model.tokenizer_digest if manifest.model else None


def make_engine(model_dir: Path, config: ServeConfig) -> Engine:
    """The engine that `config` names, for the model in `model_dir`; nothing is loaded before it starts."""
    return cast(Engine, importlib.import_module(MODULES[config.engine]).make_engine(model_dir, config))
