"""OpenVINO's model run over whole sequences, without the pipeline that serves it: that one tells only the token that it chose."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy
import openvino

from serving.config import ServeConfig
from serving.engines.openvino_device import device_properties
from serving.engines.openvino_steps import MODEL_NAME

Logprobs = Any


def log_probabilities(model_dir: Path, config: ServeConfig) -> Callable[[Sequence[int], int], Logprobs]:
    """A function from token ids, the last A of them an answer, to log-probabilities (A, V) of what stands in the place of each.

    Raises RuntimeError when OpenVINO cannot read the model.
    """
    properties = device_properties(model_dir, config.cpus_per_replica, config.precision)
    request = openvino.Core().compile_model(model_dir / MODEL_NAME, "CPU", properties).create_infer_request()

    def run(ids: Sequence[int], num_answer: int) -> Logprobs:
        request.reset_state()
        places = numpy.arange(len(ids), dtype=numpy.int64)[None]
        given = {"input_ids": [ids], "attention_mask": numpy.ones_like(places), "position_ids": places}
        inputs = {name: numpy.asarray(value, dtype=numpy.int64) for name, value in given.items()}
        logits = request.infer({**inputs, "beam_idx": numpy.zeros(1, dtype=numpy.int32)})["logits"][0, -num_answer - 1 : -1]
        shifted = logits - logits.max(axis=-1, keepdims=True)
        return shifted - numpy.log(numpy.exp(shifted).sum(axis=-1, keepdims=True))

    return run
