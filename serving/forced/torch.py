"""The reference engine's model, with its weights as they are served, run over whole sequences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from serving.config import ServeConfig
from serving.engines.torch_steps import load_model

Logprobs = Any


def log_probabilities(model_dir: Path, config: ServeConfig) -> Callable[[Sequence[int], int], Logprobs]:
    """A function from token ids, the last A of them an answer, to log-probabilities (A, V) of what stands in the place of each.

    Raises OSError or ValueError when transformers cannot read the model.
    """
    model = load_model(model_dir, config.weights)

    def run(ids: Sequence[int], num_answer: int) -> Logprobs:
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([list(ids)], device=model.device)).logits[0, -num_answer - 1 : -1]
        return torch.log_softmax(logits.float(), dim=-1).cpu().numpy()

    return run
