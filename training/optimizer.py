"""The optimizers, over the flat master tensor; their state as named tensors for checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from infra.errors import ArtifactError
from training.checkpoint import TrainState
from training.config import TrainConfig
from training.parameters import TrainableParameters

SGD_MOMENTUM = 0.9
CHUNK_ELEMENTS = 1 << 22
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
        made: torch.optim.Optimizer = getattr(bitsandbytes.optim, paged if master.is_cuda else plain)(
            _chunks(parameters), weight_decay=decay
        )
        return made
    return torch.optim.AdamW([master], weight_decay=decay, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The rate of the next step."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def read_state(optimizer: torch.optim.Optimizer, into: TrainState, num_elements: int) -> None:
    """Puts the optimizer's own tensors and numbers into a state, as `optimizer.<parameter>.<name>`.

    What has one fp32 number an element, `num_elements` in all, can be cut for other workers; the rest is opaque.
    """
    numbers = {}
    for index, parameter in enumerate(_parameters(optimizer)):
        for name, value in optimizer.state[parameter].items():
            key = f"{STATE_PREFIX}{index}.{name}"
            if isinstance(value, Tensor) and value.dim():
                place = into.flat if value.numel() == num_elements and value.dtype == torch.float32 else into.opaque
                place[key] = value
            elif value is not None:
                numbers[key] = [float(value), isinstance(value, Tensor)]
    into.facts["optimizer"] = numbers


def write_state(optimizer: torch.optim.Optimizer, state: TrainState) -> None:
    """Gives the optimizer what `read_state` took. Raises ArtifactError where that is of an optimizer with other pieces."""
    states: dict[int, dict[str, Any]] = {}
    numbers = {key: torch.tensor(value) if is_tensor else int(value) for key, (value, is_tensor) in state.facts["optimizer"].items()}
    for key, value in {**state.flat, **state.opaque, **numbers}.items():
        if key.startswith(STATE_PREFIX):
            index, _, name = key.removeprefix(STATE_PREFIX).partition(".")
            states.setdefault(int(index), {})[name] = value.clone() if isinstance(value, Tensor) else value
    parameters = _parameters(optimizer)
    if len(states) not in (0, len(parameters)):
        raise ArtifactError(
            f"the checkpoint holds the optimizer's state in {len(states)} piece(s), and it is stepped in {len(parameters)} here: another "
            "version or other settings wrote it. Go on with those, or remove the checkpoints and train anew."
        )
    for index, found in states.items():
        optimizer.state[parameters[index]] = found


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _chunks(parameters: TrainableParameters) -> list[nn.Parameter]:
    """The master values in pieces that share their memory: on a CPU bitsandbytes makes four fp32 copies of what it steps at once.

    Small pieces find room in what the backward pass has freed: with four times as large ones the 135M model took 0.3 GB more.
    """
    return _sharing(parameters.master.data.split(CHUNK_ELEMENTS), parameters.gradient.split(CHUNK_ELEMENTS))


def _matrices(parameters: TrainableParameters) -> list[nn.Parameter]:
    """The master values parameter by parameter, sharing memory with the flat ones, gradients too."""
    return _sharing(parameters.views(parameters.master.data), parameters.views(parameters.gradient))


def _sharing(values: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[nn.Parameter]:
    """Parameters that are these tensors, with these gradients."""
    found = [nn.Parameter(each) for each in values]
    for parameter, gradient in zip(found, gradients, strict=True):
        parameter.grad = gradient
    return found
