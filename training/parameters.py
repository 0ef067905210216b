"""What is trained, as one flat fp32 tensor, whatever dtype and layout the model computes in.

Norm, optimizer and all-reduce are then one call each, and gradients of many backward passes add up in fp32.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


class TrainableParameters:
    """fp32 master values and gradients of every parameter of `model` that requires one; the model holds rounded copies."""

    def __init__(self, model: nn.Module) -> None:
        found = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.names = list(found)
        self._parameters = list(found.values())
        held = [local(parameter.data) for parameter in found.values()]
        self.shapes = [values.shape for values in held]
        self.master = nn.Parameter(torch.cat([values.float().flatten() for values in held]))
        self.master.grad = torch.zeros_like(self.master)
        self._publish: list[tuple[Tensor, Tensor]] = []
        for parameter, values, gradient in zip(found.values(), self.views(self.master.data), self.views(self.gradient), strict=True):
            self._bind(parameter, values)
            parameter.register_post_accumulate_grad_hook(partial(_move_gradient, into=gradient))

    def views(self, flat: Tensor) -> list[Tensor]:
        """`flat` cut into the parameters' shapes, sharing its memory."""
        sizes = [shape.numel() for shape in self.shapes]
        return [piece.view(shape) for piece, shape in zip(flat.split(sizes), self.shapes, strict=True)]

    @property
    def gradient(self) -> Tensor:
        """The fp32 gradient collected so far, flat."""
        assert self.master.grad is not None
        return self.master.grad

    def publish(self) -> None:
        """Rounds the master values into the tensors that the model computes with."""
        if self._publish:
            held, values = zip(*self._publish, strict=True)
            torch._foreach_copy_(held, values)

    def parts(self, flat: Tensor) -> dict[str, Tensor]:
        """`flat` by the parameters' names, sharing its memory, each a part of the whole where workers hold parts."""
        return {name: distributed(view, like=each) for name, view, each in zip(self.names, self.views(flat), self._parameters, strict=True)}

    def whole_tensors(self) -> dict[str, Tensor]:
        """fp32 values by the parameters' names; where workers hold parts, every one of them must call and each gets the whole."""
        parts: dict[str, Any] = self.parts(self.master.detach())
        return {name: part.full_tensor() if hasattr(part, "full_tensor") else part.clone() for name, part in parts.items()}

    def _bind(self, parameter: nn.Parameter, values: Tensor) -> None:
        """A parameter in fp32 is the master itself; any other gets a copy at each `publish`."""
        held = local(parameter.data)
        if held is parameter.data and held.dtype == torch.float32:
            parameter.data = values
        else:
            self._publish.append((held, values))


def _move_gradient(parameter: nn.Parameter, into: Tensor) -> None:
    """After each backward pass: adds a parameter's gradient to the fp32 one."""
    assert parameter.grad is not None
    into.add_(local(parameter.grad))
    parameter.grad = None


def distributed(value: Tensor, like: Any) -> Tensor:
    """`value` as a part of the tensor that `like` is a part of, laid out alike; itself where `like` is whole."""
    if not hasattr(like, "placements"):
        return value
    from torch.distributed.tensor import DTensor

    made: Tensor = DTensor.from_local(value, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())
    return made


def local(tensor: Tensor) -> Tensor:
    """This worker's part of a tensor that several workers hold together, else the tensor itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
