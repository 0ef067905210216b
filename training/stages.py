"""The packs of one step through the stages of a pipeline, one forward and one backward in turn (1F1B).

Packs differ in length and stages exchange tensors of one shape, so what crosses a boundary is padded to the step's longest pack; each
stage cuts it back, and computes on real tokens only. Source: torch `distributed/pipelining`; Narayanan et al. 2019, PipeDream.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import Schedule1F1B

from training.layout import Layout
from training.model import PackModel
from training.packing import Pack


class _Stage(nn.Module):  # type: ignore[misc]
    """One stage as torch's pipeline wants it: tensors of fixed shapes, and which pack they belong to."""

    def __init__(self, model: PackModel, packs: Sequence[Pack], places: int) -> None:
        super().__init__()
        self.model, self.packs, self.places = model, packs, places

    def forward(self, hidden: Tensor, pack: Tensor) -> Tensor:
        """hidden (1, places, H) and a pack's index (1) -> (1, places, H), or from the last stage the sum of the losses, (1)."""
        chosen = self.packs[int(pack)]
        out: Tensor = self.model(chosen, None if self.model.is_first else hidden[:, : chosen.ids.shape[1]])
        if self.model.is_last:
            return out.sum().reshape(1)
        return nn.functional.pad(out, (0, 0, 0, self.places - out.shape[1]))


def run_stages(model: PackModel, layout: Layout, packs: Sequence[Pack], weight: float, backward: bool) -> float:
    """One step's packs through all stages; the sum of the losses on the last stage, zero on the others.

    With `backward` the gradients are those of that sum times `weight`.
    """
    assert layout.mesh is not None
    places = max(pack.ids.shape[1] for pack in packs)
    config, dtype = model.causal_model.config, model.causal_model.dtype
    boundary = torch.empty(1, places, config.hidden_size, dtype=dtype, device=layout.device, requires_grad=backward)
    stage = PipelineStage(
        _Stage(model, packs, places), layout.place("pipeline"), layout.sizes["pipeline"], layout.device,
        input_args=(boundary,), output_args=(torch.empty(1, device=layout.device, requires_grad=backward) if model.is_last else boundary,),
        group=layout.mesh.get_group("pipeline"),
    )  # fmt: skip
    schedule = Schedule1F1B(stage, len(packs), loss_fn=lambda total, _target: total.sum() * weight, scale_grads=False)
    index = torch.arange(len(packs))
    inputs = (boundary.detach().repeat(len(packs), 1, 1),) if model.is_first else ()
    losses: list[Tensor] = []
    run = schedule.step if backward else schedule.eval
    run(*inputs, pack=index, target=index if model.is_last else None, losses=losses if model.is_last else None, return_outputs=False)
    return float(torch.stack(losses).double().sum()) / weight if losses else 0.0
