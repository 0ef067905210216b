"""Corrections of vLLM 0.32 where it computes on a processor; loaded in its own process."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm.lora.ops.torch_ops import lora_ops
from vllm.lora.punica_wrapper import punica_cpu
from vllm.v1.sample.ops import topk_topp_sampler


def spare_requests_without_adapter() -> None:
    """Makes the plain torch products pass over the tokens of requests without an adapter, which are marked by the index -1.

    vLLM takes the last adapter that it holds for them, where they share a step with requests for an adapter: the base model then
    answers as that adapter does (vllm-project/vllm pull request 48421). What A gives is set to zero, so B adds nothing.
    """
    shrink = lora_ops.bgmv_shrink

    def bgmv_shrink(inputs: Tensor, weights: Tensor, output_tensor: Tensor, indices: Tensor, *scaling: Any, **named: Any) -> None:
        shrink(inputs, weights, output_tensor, indices, *scaling, **named)
        output_tensor.masked_fill_((indices < 0)[:, None], 0)

    lora_ops.bgmv_shrink = punica_cpu.bgmv_shrink = bgmv_shrink


def allow_top_k_of_no_rows() -> None:
    """Makes top-k pass over a step in which no guess is checked; vLLM asks for the largest of no values there, and the engine fails."""
    apply_top_k = topk_topp_sampler.apply_top_k_only

    def apply_top_k_only(logits: Tensor, k: Tensor, *given: Any, **named: Any) -> Tensor:
        return apply_top_k(logits, k, *given, **named) if k.numel() else logits

    topk_topp_sampler.apply_top_k_only = apply_top_k_only
