"""Where one worker stands among all: a mesh with the dimensions pipeline, data, shard and tensor, and sums over each of them.

Neighbouring ranks share the tensor dimension, which talks most; workers that differ in `pipeline` or `tensor` alone see the same rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from training.config import ParallelConfig
from training.parameters import TrainableParameters

DIMENSIONS = ("pipeline", "data", "shard", "tensor")


class Layout:
    """One worker's place. A single worker needs no process group, and every sum is then the value itself."""

    def __init__(self, parallel: ParallelConfig | None = None, num_workers: int = 1, device: torch.device | None = None) -> None:
        parallel = parallel or ParallelConfig()
        self.device = device or torch.device("cpu")
        data = num_workers // (parallel.pipeline * parallel.shard * parallel.tensor)
        self.sizes = dict(zip(DIMENSIONS, (parallel.pipeline, data, parallel.shard, parallel.tensor), strict=True))
        self.mesh = None
        if num_workers > 1:
            from torch.distributed.device_mesh import init_device_mesh

            self.mesh = init_device_mesh(self.device.type, tuple(self.sizes.values()), mesh_dim_names=DIMENSIONS)
        self.rank = dist.get_rank() if self.mesh else 0
        self.data_size = data * parallel.shard
        self.data_rank = self.place("data") * parallel.shard + self.place("shard")

    def place(self, dimension: str) -> int:
        """This worker's coordinate, from zero."""
        return int(self.mesh.get_local_rank(dimension)) if self.mesh else 0

    @property
    def num_workers(self) -> int:
        """Workers that train together now."""
        return math.prod(self.sizes.values())

    @property
    def parts(self) -> int:
        """Among how many workers the products of one pack are shared out."""
        return self.sizes["pipeline"] * self.sizes["tensor"]

    @property
    def is_split(self) -> bool:
        """Whether workers hold different parts of the model."""
        return any(self.sizes[name] > 1 for name in ("pipeline", "shard", "tensor"))

    def sum_over(self, dimension: str, value: Tensor) -> Tensor:
        """`value`, in place, summed over the workers that differ in one dimension only."""
        if self.mesh and self.sizes[dimension] > 1:
            dist.all_reduce(value, group=self.mesh.get_group(dimension))
        return value

    def sum_over_all(self, value: Tensor) -> Tensor:
        """`value`, in place, summed over every worker."""
        if self.mesh:
            moved = value.to(self.device)
            dist.all_reduce(moved)
            value.copy_(moved)
        return value

    def any(self, value: bool) -> bool:
        """Whether it is true for any worker."""
        return bool(self.sum_over_all(torch.tensor([float(value)]))) if self.mesh else value

    def all_values(self, value: float) -> list[float]:
        """Every worker's value, by rank."""
        if not self.mesh:
            return [value]
        values = torch.zeros(dist.get_world_size(), dtype=torch.float64)
        values[self.rank] = value
        return list(self.sum_over_all(values).tolist())

    def sum_losses(self, loss_sum: float) -> float:
        """Losses of all workers' rows; those of one tensor group computed the same, and only a pipeline's last stage has any."""
        return float(self.sum_over_all(torch.tensor([loss_sum / self.sizes["tensor"]], dtype=torch.float64)))


def reduce_gradient(layout: Layout, parameters: TrainableParameters, partial_names: frozenset[str]) -> None:
    """Sums the flat gradient over the copies of the model, and over the tensor group where each worker saw a part of the layer only.

    Over the shard dimension FSDP has summed it already.
    """
    layout.sum_over("data", parameters.gradient)
    partial = [view for name, view in zip(parameters.names, parameters.views(parameters.gradient), strict=True) if name in partial_names]
    if partial:
        joined = layout.sum_over("tensor", torch.cat([view.flatten() for view in partial]))
        for view, values in zip(partial, joined.split([view.numel() for view in partial]), strict=True):
            view.copy_(values.view(view.shape))


def gradient_norm(layout: Layout, parameters: TrainableParameters, sharers: Sequence[int]) -> float:
    """Norm of the whole gradient; `sharers` says of each parameter how many workers hold the same part of it."""
    if not layout.is_split:
        return float(parameters.gradient.norm())
    views = parameters.views(parameters.gradient)
    squares = sum(view.double().square().sum() / count for view, count in zip(views, sharers, strict=True))
    return math.sqrt(float(layout.sum_over_all(torch.as_tensor(squares, dtype=torch.float64).reshape(1))))


def count_sharers(layout: Layout, model: nn.Module) -> list[int]:
    """For each trainable parameter, how many workers hold the same part of it."""
    counts = []
    for parameter in (each for each in model.parameters() if each.requires_grad):
        names = parameter.device_mesh.mesh_dim_names if hasattr(parameter, "device_mesh") else ()
        placements = getattr(parameter, "placements", ())
        split = {name for name, placement in zip(names, placements, strict=True) if not placement.is_replicate()}
        counts.append(math.prod(layout.sizes[name] for name in ("data", "shard", "tensor") if name not in split))
    return counts
