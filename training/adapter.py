"""The files of a LoRA adapter, in PEFT's format; no torch."""

from __future__ import annotations

from collections.abc import Iterable

from infra.contracts import AdapterFacts
from infra.errors import ConfigError
from training.config import LoraConfig

ADAPTER_NAME = "adapter_model.safetensors"
ADAPTER_CONFIG_NAME = "adapter_config.json"
PEFT_PREFIX = "base_model.model."


def adapter_facts(config: LoraConfig) -> AdapterFacts:
    """The facts of the adapter that this config trains."""
    return AdapterFacts(**config.model_dump(exclude={"dropout"}))


def check_targets(targets: Iterable[str], linear_names: Iterable[str]) -> None:
    """Raises ConfigError where a target is not the name of a linear layer; `linear_names` are full module names."""
    exist = {name.rpartition(".")[2] for name in linear_names}
    if unknown := sorted(set(targets) - exist):
        raise ConfigError(
            f"training.lora.target_modules: {unknown} are no linear layers of this model; it has {sorted(exist)}. Choose among these."
        )
