"""The base model with adapters, and the loss of one pack."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from infra.contracts import AdapterFacts
from infra.errors import ConfigError
from training import attention
from training.adapter import adapter_scale
from training.lora import attach
from training.loss import SupervisedLoss
from training.norm import replace_norms
from training.packing import Pack

# Models whose forward is decoder, then one plain head, with rotary positions and causal attention in every layer.
KNOWN_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")


def load_base(base_dir: Path, dtype: torch.dtype, implementation: str = attention.NAME) -> nn.Module:
    """The frozen model of a base or merged folder, in `dtype`. Raises ConfigError for a kind of model that the trainer does not know."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    AttentionInterface.register(attention.NAME, attention.packed_attention)
    config = AutoConfig.from_pretrained(base_dir)
    if config.model_type not in KNOWN_MODEL_TYPES or getattr(config, "sliding_window", None):
        raise ConfigError(
            f"{base_dir}: model type {config.model_type!r}, sliding window {getattr(config, 'sliding_window', None)}; the trainer knows "
            f"{', '.join(KNOWN_MODEL_TYPES)} without a sliding window. Choose such a base model."
        )
    model: nn.Module = AutoModelForCausalLM.from_pretrained(base_dir, dtype=dtype, attn_implementation=implementation, use_safetensors=True)
    model.requires_grad_(False)
    if implementation != "eager":  # eager is the model as transformers wrote it, which the tests compare ours with
        replace_norms(model)
    return model.eval()


def attach_adapter(model: nn.Module, facts: AdapterFacts, dropout: float = 0.0) -> None:
    """Puts zero adapters on the model's target layers. Raises ConfigError for a target that does not exist."""
    attach(model, facts.rank, adapter_scale(facts), dropout, facts.target_modules)


def token_losses(model: Any, pack: Pack) -> Tensor:
    """fp32 losses (S) of the pack's supervised tokens."""
    output = model.get_decoder()(input_ids=pack.ids, position_ids=pack.positions, use_cache=False, packing=pack)
    hidden = output.last_hidden_state[0].index_select(0, pack.predicting_places)
    losses: Tensor = SupervisedLoss.apply(hidden, model.get_output_embeddings().weight, pack.targets)  # type: ignore[no-untyped-call]
    return losses
