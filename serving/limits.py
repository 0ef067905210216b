"""What each engine can take, as declared facts, so that a run is refused before it trains what could not be served.

Light: the driver reads it. A test holds the facts against the installed engine. Another engine is one more entry.
"""

from __future__ import annotations

from pydantic import Field

from infra.config import Config
from infra.contracts import AdapterFacts
from serving.config import EngineName, ServeConfig

MODEL_TYPES = frozenset({"llama", "mistral", "qwen2", "qwen3"})
"""Those that can be trained; others were not looked at."""
LAYERS = frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"})
"""The linear layers of these models."""


class AdapterLimits(Config):
    """Adapters that an engine can put on a base while it serves."""

    max_rank: int = Field(ge=1)
    takes_dora: bool
    takes_rslora: bool
    modules: frozenset[str]
    """Names of the layers that may have an adapter."""


class EngineLimits(Config):
    """What one engine can take."""

    model_types: frozenset[str]
    """`model_type` of config.json, of the models that it loads."""
    adapters: AdapterLimits
    cache_value_bytes: int | None = None
    """Least bytes of one number in the KV cache; None where it is not known."""


ENGINES = {
    # optimum-intel 2.2, exporters/openvino/model_configs.py: has an export of these with the task text-generation-with-past. OpenVINO
    # GenAI 2026.4 passes over DoRA's norms without a word. On a processor its KV cache holds 8-bit numbers with scales.
    "openvino": EngineLimits(
        model_types=MODEL_TYPES,
        adapters=AdapterLimits(max_rank=512, takes_dora=False, takes_rslora=True, modules=LAYERS),
        cache_value_bytes=1,
    ),
    # Low-rank products of our own (engines/torch_adapters.py).
    "torch": EngineLimits(
        model_types=MODEL_TYPES, adapters=AdapterLimits(max_rank=512, takes_dora=False, takes_rslora=True, modules=LAYERS)
    ),
    # vLLM 0.32: config/lora.py (MaxLoRARanks), lora/peft_helper.py (_validate_features), lora/utils.py (get_supported_lora_modules) and
    # model_executor/models/registry.py.
    "vllm": EngineLimits(
        model_types=MODEL_TYPES,
        adapters=AdapterLimits(max_rank=512, takes_dora=False, takes_rslora=True, modules=LAYERS | {"embed_tokens", "lm_head"}),
    ),
}
ENGINE_OF_FORMAT: dict[str, EngineName] = {
    "openvino-int8": "openvino",
    "openvino-int4": "openvino",
    "openvino-int4-awq": "openvino",
    "bf16": "openvino",
    "bnb-int8": "torch",
    "bnb-nf4": "torch",
    "vllm-bf16": "vllm",
}
"""Which engine reads each weight format."""


def with_engine_of(serve: ServeConfig, weight_format: str | None) -> ServeConfig:
    """`serve` with the engine that reads the format, where it names none of its own; for other models as it is."""
    if weight_format not in ENGINE_OF_FORMAT or "engine" in serve.model_fields_set:
        return serve
    return serve.model_copy(update={"engine": ENGINE_OF_FORMAT[weight_format]})


def model_problems(engine: str, model_type: object) -> list[str]:
    """Why an engine is not trusted to load a kind of model; empty where it is."""
    known = ENGINES[engine].model_types
    if model_type in known:
        return []
    return [f"model type {model_type!r} is not among those that the engine {engine} is known to load, {', '.join(sorted(known))}"]


def cache_tokens(engine: str, values_per_token: int, cache_gb: float) -> int | None:
    """Most tokens that one request can hold in the KV cache, never fewer than the engine has room for; None where that is not known."""
    value_bytes = ENGINES[engine].cache_value_bytes
    return int(cache_gb * (1 << 30)) // (values_per_token * value_bytes) if value_bytes else None


def adapter_problems(engine: str, adapter: AdapterFacts) -> list[str]:
    """Why an engine cannot put an adapter on the base while it serves; empty where it can. A merged adapter has no such limits."""
    limits = ENGINES[engine].adapters
    problems = []
    if adapter.rank > limits.max_rank:
        problems.append(f"rank {adapter.rank}, the engine {engine} takes {limits.max_rank} at most: lower train.lora.rank, or merge")
    if adapter.use_dora and not limits.takes_dora:
        problems.append(f"the engine {engine} takes no DoRA adapter: set train.lora.use_dora to false, or merge")
    if adapter.use_rslora and not limits.takes_rslora:
        problems.append(f"the engine {engine} takes no rsLoRA adapter: set train.lora.use_rslora to false, or merge")
    if unknown := sorted(set(adapter.target_modules) - limits.modules):
        problems.append(f"adapters on {unknown}, the engine {engine} takes {sorted(limits.modules)}: change target_modules, or merge")
    return problems
