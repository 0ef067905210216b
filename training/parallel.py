"""One model over several workers: layers cut by pipeline stage, matrices by tensor group, everything by shard group; in this order.

Cut parameters are DTensors, so their placements alone say how to gather, norm and store them.
Sources: Shoeybi et al. 2019, arXiv 1909.08053 (columns, then rows); torch `distributed/fsdp/_fully_shard`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DeviceMesh, Shard, distribute_tensor

from training.layout import Layout
from training.lora import LoraLinear
from training.model import PackModel
from training.parameters import local

COLUMN_LAYERS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")  # outputs are cut
ROW_LAYERS = ("o_proj", "down_proj")  # inputs are cut
HEAD_NORMS = ("q_norm", "k_norm")  # held whole, used on this worker's heads


def parallelize(model: PackModel, layout: Layout) -> frozenset[str]:
    """Keeps this worker's part of `model`; names of the parameters whose gradient the tensor group must sum."""
    partial: frozenset[str] = frozenset()
    if layout.mesh is None:
        return partial
    if layout.sizes["pipeline"] > 1:
        keep_stage(model, layout.place("pipeline"), layout.sizes["pipeline"])
    if layout.sizes["tensor"] > 1:
        partial = split_matrices(model, layout.mesh["tensor"])
    if layout.sizes["shard"] > 1:
        shard(model, layout.mesh["shard"])
    return partial


def keep_stage(model: PackModel, stage: int, num_stages: int) -> None:
    """Drops the layers of other stages; the first stage embeds, the last has norm and head. Names of layers stay."""
    causal_model, layers = model.causal_model, model.causal_model.model.layers
    bounds = [len(layers) * place // num_stages for place in range(num_stages + 1)]
    kept = {str(index): layers[index] for index in range(bounds[stage], bounds[stage + 1])}
    causal_model.model.layers = nn.ModuleDict(kept)
    model.is_first, model.is_last = stage == 0, stage == num_stages - 1
    if not model.is_first:
        causal_model.model.embed_tokens = None
    if not model.is_last:
        causal_model.model.norm = causal_model.lm_head = None


def split_matrices(model: PackModel, mesh: DeviceMesh) -> frozenset[str]:
    """Cuts every layer's matrices over the tensor group: heads and the width between gate and down."""
    partial = set()
    group = mesh.get_group()
    for name, module in list(model.named_modules()):
        child = name.rpartition(".")[2]
        if child in COLUMN_LAYERS:
            partial |= {f"{name}.{part}" for part in _cut(model, name, {"weight": 0, "bias": 0, "lora_B": 0}, mesh)}
        elif child in ROW_LAYERS:
            partial |= {f"{name}.{part}" for part in _cut(model, name, {"weight": 1, "lora_A": 1}, mesh)}
            model.get_submodule(name).register_forward_hook(lambda _module, _inputs, output: _Leave.apply(output, group))
        elif child in ("self_attn", "mlp"):
            module.register_forward_pre_hook(_enter(group), with_kwargs=True)
        elif child in HEAD_NORMS:
            partial.add(f"{name}.weight")
    return frozenset(partial)


def shard(model: PackModel, mesh: DeviceMesh) -> None:
    """FSDP2: each layer, and what is left as one more unit, is whole only while it is needed. Gradients are summed, in fp32."""
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    layers = model.causal_model.model.layers
    for unit in [*(layers.values() if isinstance(layers, nn.ModuleDict) else layers), model]:
        sharded = fully_shard(unit, mesh=mesh, mp_policy=policy)
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)  # gloo has no sum that multiplies on the way


class SplitLinear(nn.Module):  # type: ignore[misc]
    """This worker's part of a linear layer without adapter."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        return nn.functional.linear(x, local(self.weight), None if self.bias is None else local(self.bias))


def _cut(model: nn.Module, name: str, dimensions: Mapping[str, int], mesh: DeviceMesh) -> list[str]:
    """Cuts the named parameters of one layer; names of the adapter's other parameters, whose gradient is then a part only."""
    layer = model.get_submodule(name)
    if not isinstance(layer, LoraLinear):
        parent, _, child = name.rpartition(".")
        layer = SplitLinear(layer)
        setattr(model.get_submodule(parent), child, layer)
    found = dict(layer.named_parameters(recurse=False))
    for part, dimension in dimensions.items():
        if part in found:
            cut = distribute_tensor(found[part].data, mesh, [Shard(dimension)])
            setattr(layer, part, nn.Parameter(cut, requires_grad=found[part].requires_grad))
    return [part for part in found if part.startswith("lora_") and part not in dimensions]


def _enter(group: dist.ProcessGroup) -> Any:
    """A hook that marks where the whole activation begins to be used by each worker in part."""

    def hook(_module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if inputs:
            return (_Enter.apply(inputs[0], group), *inputs[1:]), named
        return inputs, {**named, "hidden_states": _Enter.apply(named["hidden_states"], group)}

    return hook


class _Enter(torch.autograd.Function):  # type: ignore[misc]
    """The value itself; each worker's gradient is a part, so they are summed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        """x."""
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Sum over the group."""
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


class _Leave(torch.autograd.Function):  # type: ignore[misc]
    """The sum of the workers' parts; the gradient is the same for each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        """Sum over the group."""
        total = x.contiguous().clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient itself."""
        return gradients[0], None
