"""Guesses change no answer, on real, small models; and what could not work is refused before anything starts."""

from __future__ import annotations

import itertools
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from infra.errors import ArtifactError, ConfigError
from serving.config import ServeConfig
from serving.engines import openvino_steps
from serving.engines.base import Sampling
from serving.engines.child import Batch
from serving.engines.registry import verify_model

NUM_PROMPTS = 8
SETTINGS = {"max_running_requests": 16, "num_threads": 2}
VARIANTS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "stopped": {"stop_ids": tuple(range(2, 300, 40))},
    "frequency": {"frequency_penalty": 0.5},
    "repetition": {"repetition_penalty": 1.3},
}


def jobs(max_tokens: int = 80, **sampling: Any) -> list[tuple[list[int], Sampling]]:
    """Prompts of random tokens, some of which stand twice; the same every time."""
    chance = random.Random(1)
    prompts = [[chance.randrange(5, 250) for _ in range(chance.randrange(2, 30))] * 2 for _ in range(NUM_PROMPTS)]
    return [(prompt, Sampling(max_tokens=max_tokens, **sampling)) for prompt in prompts]


def answers(batch: Batch, requests: list[tuple[list[int], Sampling]]) -> list[tuple[list[int], str | None]]:
    """Ids and finish reasons, all requests at once."""
    ids: list[list[int]] = [[] for _ in requests]
    reasons: list[str | None] = [None] * len(requests)
    for number, (prompt, sampling) in enumerate(requests):
        assert batch.add(number, prompt, sampling) is None
    while batch.has_work:
        for number, more, _, reason, refusal in batch.step():
            assert refusal is None
            ids[number] += more
            reasons[number] = reasons[number] or reason
    return list(zip(ids, reasons, strict=True))


def openvino_batch(model_dir: Path, cache_gb: float = 0.1, **speculative: Any) -> Batch:
    guesses = {"max_requests": 16, "min_acceptance": 0.0, **speculative} if speculative else None
    return openvino_steps.make_batch(speculative=guesses, model_dir=str(model_dir), cache_gb=cache_gb, precision="f32", **SETTINGS)


@pytest.fixture(scope="module", params=["prompt_lookup", "draft"])
def openvino_pair(request: pytest.FixtureRequest, toy_quantized: Path) -> tuple[Batch, Batch]:
    """One without guesses and one with; the toy is its own small model."""
    draft = {"draft_model_dir": str(toy_quantized)} if request.param == "draft" else {}
    guessing = openvino_batch(toy_quantized, kind=request.param, **draft)
    guessing._clock = itertools.count().__next__  # type: ignore[attr-defined]  # all steps take as long, so that guesses always pay
    return guessing._plain, guessing  # type: ignore[attr-defined]  # the batch beside it, whose keys are rounded alike


@pytest.mark.parametrize("variant", VARIANTS)
def test_openvino_answers_with_guesses_are_those_without(openvino_pair: tuple[Batch, Batch], variant: str) -> None:
    """Whether there are guesses or, for a penalty that counts what was written, none.

    But for one or two of eight, in which two logits are the same but for the order of sums (one was seen); a wrong guess kept, or keys
    rounded by the block, change all of them. Greedy ones: a sampled token hangs on less.
    """
    plain, guessing = openvino_pair
    before = guessing.figures[5:]
    pairs = zip(answers(guessing, jobs(**VARIANTS[variant])), answers(plain, jobs(**VARIANTS[variant])), strict=True)
    assert sum(made == expected for made, expected in pairs) >= NUM_PROMPTS - 2
    num_drafts, _, num_accepted = (after - earlier for after, earlier in zip(guessing.figures[5:], before, strict=True))  # type: ignore[operator]
    assert bool(num_drafts) is (variant != "frequency")
    assert num_accepted > 0 or variant in ("frequency", "repetition")  # which leaves nothing to look up


def test_openvino_sampled_requests_are_answered_and_repeatable(openvino_pair: tuple[Batch, Batch]) -> None:
    _, guessing = openvino_pair
    first = answers(guessing, jobs(temperature=1.0, seed=5))
    assert first == answers(guessing, jobs(temperature=1.0, seed=5))
    assert {(len(ids), reason) for ids, reason in first} == {(80, "length")}


def test_openvino_requests_that_move_go_on_as_they_would_have(openvino_pair: tuple[Batch, Batch]) -> None:
    """After 10 steps a request comes that must not be guessed for, which all others follow; once it has ended, they go back."""
    plain, guessing = openvino_pair
    requests = jobs()
    made: list[list[int]] = [[] for _ in requests]
    num_guessed = []
    for number, (prompt, sampling) in enumerate(requests):
        assert guessing.add(number, prompt, sampling) is None
    num_steps = 0
    while guessing.has_work:
        for number, ids, *_ in guessing.step():
            if number < NUM_PROMPTS:
                made[number] += ids
        num_steps += 1
        num_guessed.append(guessing.figures[6])
        if num_steps == 10:
            assert guessing.add(NUM_PROMPTS, [5, 6], Sampling(max_tokens=5, frequency_penalty=1.0)) is None
    assert sum(ids == expected for ids, (expected, _) in zip(made, answers(plain, requests), strict=True)) >= NUM_PROMPTS - 2
    assert num_guessed[9] == num_guessed[15] < num_guessed[-1]


def test_openvino_is_never_short_of_cache_for_guesses(toy_quantized: Path) -> None:
    """A quarter of this cache holds 15 blocks of 32 tokens, where an answer may take 7: two requests have guesses, and more have not."""
    guessing = openvino_batch(toy_quantized, cache_gb=60 * 32 * 2 * 2 * (32 + 8 + 8) / (1 << 30), num_tokens=3)
    prompts = [prompt for prompt, _ in jobs()]
    requests = [(prompt, Sampling(max_tokens=180 - len(prompt) if number < 2 else 60)) for number, prompt in enumerate(prompts)]
    for number in range(2):
        guessing.add(number, *requests[number])
    for _ in range(5):
        guessing.step()
    num_guessed = guessing.figures[6]
    assert num_guessed
    for number in range(2):
        guessing.cancel(number)
    made = answers(guessing, requests)
    assert [len(ids) for ids, _ in made] == [sampling.max_tokens for _, sampling in requests]
    assert guessing.figures[6] > num_guessed  # type: ignore[operator]  # by those that end last


@pytest.mark.parametrize("sampling", [*VARIANTS.values(), {"temperature": 1.0, "seed": 5}, {"temperature": 1.5, "seed": 6, "top_k": 4}])
def test_torch_answers_with_guesses_are_those_without_sampled_ones_too(toy_base: Path, sampling: dict[str, Any]) -> None:
    from serving.engines import torch_steps

    guesses = {"max_requests": 16, "min_acceptance": 0.0}
    plain, guessing = (
        torch_steps.make_batch(str(toy_base), weights="full", speculative=speculative, **SETTINGS) for speculative in (None, guesses)
    )
    assert answers(guessing, jobs(**sampling)) == answers(plain, jobs(**sampling))
    assert guessing.figures[5] > 0  # type: ignore[operator]
    assert plain.figures == (0, 0, 0.0)


def serve(**serve: Any) -> ServeConfig:
    return ServeConfig.model_validate(serve)


def test_engine_that_cannot_guess_so_is_refused(toy_base: Path) -> None:
    config = serve(engine="torch", speculative={"kind": "draft", "draft_model_dir": str(toy_base)})
    with pytest.raises(ConfigError, match=r"'draft'.*'torch' has prompt_lookup"):
        verify_model(toy_base, config)


def test_guesses_and_adapters_together_are_refused(toy_base: Path) -> None:
    with pytest.raises(ConfigError, match=r"serve\.speculative and serve\.adapters"):
        verify_model(toy_base, serve(engine="torch", speculative={}, adapters={"lamps": "adapters/lamps"}))


def test_draft_model_that_is_damaged_or_has_another_tokenizer_is_refused(toy_quantized: Path, tmp_path: Path) -> None:
    draft = tmp_path / "draft"
    shutil.copytree(toy_quantized, draft)
    config = serve(speculative={"kind": "draft", "draft_model_dir": str(draft)})
    assert verify_model(toy_quantized, config).kind == "quantized"
    manifest = json.loads((draft / "manifest.json").read_text())
    manifest["model"]["tokenizer_digest"] = "0" * 64
    (draft / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ConfigError, match="tokenizer has sha256 000"):
        verify_model(toy_quantized, config)
    (draft / "openvino_model.bin").write_bytes(b"short")
    with pytest.raises(ArtifactError, match=r"openvino_model\.bin: sha256"):
        verify_model(toy_quantized, config)
