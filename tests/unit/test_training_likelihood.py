"""Likelihoods of the expected answers, held equal to transformers' own forward pass."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from infra.answers import read_expected, read_prompts
from infra.evaluation.metrics import Row, find_metric
from training.config import PredictJob
from training.predict import predict


def test_predict_tells_how_likely_expected_answers_are_and_the_perplexity_follows(toy_base: Path, toy_tokens: Path, tmp_path: Path) -> None:
    predict(PredictJob(output_dir=tmp_path / "out", model_dir=toy_base, tokens_dir=toy_tokens, max_new_tokens=2, score_expected=True))
    found, prompts = read_expected(tmp_path / "out"), read_prompts(toy_tokens)
    model = AutoModelForCausalLM.from_pretrained(toy_base, dtype=torch.float32)
    total, tokens = 0.0, 0
    for each, prompt in zip(found, prompts, strict=True):
        ids, num_answer = [*prompt.ids, *prompt.expected_ids], len(prompt.expected_ids)
        with torch.no_grad():
            logprobs = torch.log_softmax(model(torch.tensor([ids])).logits[0, -num_answer - 1 : -1], dim=-1)
        expected = logprobs.gather(1, torch.tensor(prompt.expected_ids)[:, None]).sum().item()
        assert (each.row, each.num_tokens) == (prompt.row, num_answer)
        assert each.logprob_sum == pytest.approx(expected, abs=1e-3)
        total, tokens = total + expected, tokens + num_answer
    metric = find_metric("perplexity")
    assert metric.pool([metric.observe(Row("", None, each)) for each in found]) == pytest.approx(  # type: ignore[arg-type]
        torch.tensor(-total / tokens).exp().item(), rel=1e-4
    )
