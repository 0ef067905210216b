"""The base model with adapters, and the losses of one pack."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from infra.contracts import AdapterFacts
from infra.errors import ConfigError
from training import generate, lora
from training.adapter import adapter_facts
from training.attention import PackView, num_positions
from training.blocks import replace_forwards, stack_weights
from training.config import KNOWN_MODEL_TYPES, TrainConfig
from training.loss import SupervisedLoss
from training.norm import replace_norms
from training.packing import Pack
from training.quantized import Quantization, load_options, replace_linears


def load_base(base_dir: Path, dtype: torch.dtype, implementation: str = generate.NAME, quantization: Quantization = "none") -> nn.Module:
    """The frozen model of a base or merged folder, in `dtype`; with implementation `eager` it is as transformers wrote it.

    Raises ConfigError for a kind of model that the trainer does not know.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    config = AutoConfig.from_pretrained(base_dir)
    if config.model_type not in KNOWN_MODEL_TYPES or getattr(config, "sliding_window", None):
        raise ConfigError(
            f"{base_dir}: model type {config.model_type!r}, sliding window {getattr(config, 'sliding_window', None)}; the trainer knows "
            f"{', '.join(KNOWN_MODEL_TYPES)} without a sliding window. Choose such a base model."
        )
    options = load_options(quantization, dtype)
    model: nn.Module = AutoModelForCausalLM.from_pretrained(
        base_dir, dtype=dtype, attn_implementation=implementation, use_safetensors=True, **options
    )
    model.requires_grad_(False)
    if quantization != "none":
        replace_linears(model)
    elif implementation != "eager":
        stack_weights(model)
    if implementation != "eager":
        replace_norms(model)
        replace_forwards(model)
    return model.eval()


def attach_adapter(model: Any, facts: AdapterFacts, dropout: float = 0.0) -> None:
    """Puts zero adapters on the model's target layers. Raises ConfigError for a target that does not exist."""
    lora.attach(model, facts, dropout, model.get_input_embeddings().weight.dtype)


def prepare_model(base_dir: Path, config: TrainConfig, dtype: torch.dtype) -> nn.Module:
    """The base model ready to be trained: with new adapters, or with every weight free."""
    model = load_base(base_dir, dtype, quantization=config.base_quantization)
    if config.method == "full":
        return model.requires_grad_(True)
    attach_adapter(model, adapter_facts(config.lora), config.lora.dropout)
    lora.initialize(model, config.seed)
    return model


class PackModel(nn.Module):  # type: ignore[misc]
    """A causal model, or one stage of it, that maps a pack to the losses of its supervised tokens."""

    def __init__(self, causal_model: Any, checkpoint_layers: bool = False) -> None:
        super().__init__()
        self.causal_model = causal_model
        self.checkpoint_layers = checkpoint_layers
        self.is_first = self.is_last = True

    def forward(self, pack: Pack, hidden: Tensor | None = None) -> Tensor:
        """fp32 losses (S), or before the last stage the hidden states (1, T, H); `hidden` comes from the stage before."""
        if self.is_first:
            hidden = self.causal_model.model.embed_tokens(pack.ids)
        assert hidden is not None
        hidden = self._run_layers(hidden, pack)
        return self._losses(hidden, pack) if self.is_last else hidden

    def _run_layers(self, hidden: Tensor, pack: Pack) -> Tensor:
        """What transformers' own decoder does for the known kinds of model, less the mask, which packs replace."""
        decoder = self.causal_model.model
        positions = torch.arange(num_positions(pack), device=hidden.device)[None]
        cos, sin = decoder.rotary_emb(hidden, position_ids=positions)
        given = {"packing": PackView(pack, cos[0], sin[0])}
        layers = decoder.layers
        for layer in layers.values() if isinstance(layers, nn.ModuleDict) else layers:
            if self.checkpoint_layers and torch.is_grad_enabled():
                hidden = checkpoint(layer, hidden, use_reentrant=False, **given)
            else:
                hidden = layer(hidden, **given)
        return hidden

    def logits(self, pack: Pack) -> Tensor:
        """(S, V): what the model says of every token in the place of each supervised one; needs the whole model on this worker."""
        hidden = self._run_layers(self.causal_model.model.embed_tokens(pack.ids), pack)
        found: Tensor = self.causal_model.get_output_embeddings()(self._predicting(hidden, pack))
        return found

    def _losses(self, hidden: Tensor, pack: Pack) -> Tensor:
        head = self.causal_model.get_output_embeddings().weight
        losses: Tensor = SupervisedLoss.apply(self._predicting(hidden, pack), head, pack.targets)  # type: ignore[no-untyped-call]
        return losses

    def _predicting(self, hidden: Tensor, pack: Pack) -> Tensor:
        normed: Tensor = self.causal_model.model.norm(hidden[0].index_select(0, pack.predicting_places))
        return normed
