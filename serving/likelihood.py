"""How likely the served model finds the expected answers to the held-out prompts, each token given the true ones before it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy

from infra.answers import ExpectedLogprob, Prompt
from serving.config import ServeConfig
from serving.forced.opening import Run, open_model


def expected_logprobs(model_dir: Path, serve: ServeConfig, prompts: Sequence[Prompt]) -> list[ExpectedLogprob]:
    """One sum a prompt, in their order; none for an engine whose library gives no whole distributions.

    Raises ArtifactError where the engine cannot read the model.
    """
    run = open_model(model_dir, serve)
    return [] if run is None else [_expected(run, prompt) for prompt in prompts]


def _expected(run: Run, prompt: Prompt) -> ExpectedLogprob:
    count = len(prompt.expected_ids)
    logprobs = run((*prompt.ids, *prompt.expected_ids), count)
    total = float(logprobs[numpy.arange(count), list(prompt.expected_ids)].sum(dtype=numpy.float64))
    return ExpectedLogprob(row=prompt.row, logprob_sum=min(0.0, total), num_tokens=count)
