"""The optimizers, over the flat master tensor; their state as named tensors for checkpoints."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from training.config import TrainConfig
from training.parameters import TrainableParameters

SGD_MOMENTUM = 0.9
STATE_PREFIX = "optimizer."
BITSANDBYTES_CLASSES = {  # by name, and whether the state may leave the GPU for the host's memory when the GPU is full
    "adamw_8bit": ("AdamW8bit", "AdamW8bit"),
    "paged_adamw": ("AdamW", "PagedAdamW"),
    "paged_adamw_8bit": ("AdamW8bit", "PagedAdamW8bit"),
    "lion": ("Lion", "Lion"),
}


def make_optimizer(config: TrainConfig, parameters: TrainableParameters) -> torch.optim.Optimizer:
    """The configured optimizer; the learning rate is set before each step.

    All but Adafactor work element by element, so one flat tensor serves; 8-bit state is quantized in blocks of 256 elements of it
    (Dettmers et al. 2022, arXiv 2110.02861). Adafactor keeps row and column sums, so it needs the matrices (arXiv 1804.04235).
    """
    master, decay = parameters.master, config.weight_decay
    if config.optimizer == "sgd":
        return torch.optim.SGD([master], momentum=SGD_MOMENTUM, weight_decay=decay, foreach=False)
    if config.optimizer == "adafactor":
        return torch.optim.Adafactor(_matrices(parameters), weight_decay=decay)
    if config.optimizer in BITSANDBYTES_CLASSES:
        import bitsandbytes

        plain, paged = BITSANDBYTES_CLASSES[config.optimizer]
        made: torch.optim.Optimizer = getattr(bitsandbytes.optim, paged if master.is_cuda else plain)([master], weight_decay=decay)
        return made
    return torch.optim.AdamW([master], weight_decay=decay, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The rate of the next step."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def state_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Copies of the optimizer's state, `optimizer.<parameter>.<name>`; whole numbers become tensors without dimensions."""
    return {
        f"{STATE_PREFIX}{index}.{name}": torch.as_tensor(value).clone()
        for index, parameter in enumerate(_parameters(optimizer))
        for name, value in optimizer.state[parameter].items()
        if value is not None
    }


def load_state_tensors(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Puts back what `state_tensors` gave."""
    states: list[dict[str, Any]] = [{} for _ in _parameters(optimizer)]
    for key, value in tensors.items():
        if key.startswith(STATE_PREFIX):
            index, _, name = key.removeprefix(STATE_PREFIX).partition(".")
            states[int(index)][name] = int(value) if value.dtype == torch.int64 else value.clone()
    for parameter, state in zip(_parameters(optimizer), states, strict=True):
        optimizer.state[parameter] = state


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _matrices(parameters: TrainableParameters) -> list[nn.Parameter]:
    """The master values parameter by parameter, sharing memory with the flat ones, gradients too."""
    found = []
    for values, gradient in zip(parameters.views(parameters.master.data), parameters.views(parameters.gradient), strict=True):
        matrix = nn.Parameter(values)
        matrix.grad = gradient
        found.append(matrix)
    return found
