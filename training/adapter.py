"""The files of a LoRA adapter, in PEFT's format; no torch."""

from __future__ import annotations

import math

from infra.contracts import AdapterFacts
from training.config import LoraConfig

ADAPTER_NAME = "adapter_model.safetensors"
ADAPTER_CONFIG_NAME = "adapter_config.json"
PEFT_PREFIX = "base_model.model."


def adapter_facts(config: LoraConfig) -> AdapterFacts:
    """The facts of the adapter that this config trains."""
    return AdapterFacts(rank=config.rank, alpha=config.alpha, target_modules=config.target_modules)


def adapter_scale(facts: AdapterFacts) -> float:
    """Factor of B A: alpha / rank, or alpha / sqrt(rank) when rank-stabilised (Kalajdzievski 2023, arXiv 2312.03732)."""
    return facts.alpha / (math.sqrt(facts.rank) if facts.use_rslora else facts.rank)
