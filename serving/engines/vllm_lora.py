"""A correction of vLLM's adapters on processors; loaded in vLLM's own process."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm.lora.ops.torch_ops import lora_ops
from vllm.lora.punica_wrapper import punica_cpu


def spare_requests_without_adapter() -> None:
    """Makes the plain torch products pass over the tokens of requests without an adapter, which are marked by the index -1.

    vLLM 0.32 takes the last adapter that it holds for them, where they share a step with requests for an adapter: the base model then
    answers as that adapter does (vllm-project/vllm pull request 48421). What A gives is set to zero, so B adds nothing.
    """
    shrink = lora_ops.bgmv_shrink

    def bgmv_shrink(inputs: Tensor, weights: Tensor, output_tensor: Tensor, indices: Tensor, *scaling: Any, **named: Any) -> None:
        shrink(inputs, weights, output_tensor, indices, *scaling, **named)
        output_tensor.masked_fill_((indices < 0)[:, None], 0)

    lora_ops.bgmv_shrink = punica_cpu.bgmv_shrink = bgmv_shrink
