"""`python -m training.predict --config F`: greedy answers of one model to the held-out prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from safetensors.torch import load_file

from infra.answers import Answer, Prompt, read_prompts, write_answers, write_expected
from infra.chat import ChatCodec, load_codec
from infra.contracts import ModelFacts, verify, write_manifest
from infra.errors import ArtifactError, ConfigError
from infra.process import Progress, run_program
from training import generate
from training.adapter import ADAPTER_NAME
from training.config import PredictJob
from training.folders import fresh_folder
from training.likelihood import expected_logprobs
from training.lora import load_tensors
from training.model import attach_adapter, load_base
from training.precision import compute_dtype


def predict(job: PredictJob) -> None:
    """Writes one answer a prompt, in the prompts' order, and where asked how likely the expected ones are.

    Raises ArtifactError where adapter and model do not belong together.
    """
    model_manifest, tokens = verify(job.model_dir, ("base", "merged")), verify(job.tokens_dir, ("tokens",))
    parents = {"model": model_manifest.digest, "tokens": tokens.digest}
    adapter = verify(job.adapter_dir, ("adapter",)) if job.adapter_dir else None
    facts = model_manifest.model
    assert facts is not None
    model: Any = load_base(job.model_dir, compute_dtype(job.precision), generate.NAME)
    if adapter is not None and job.adapter_dir is not None:
        if adapter.model is None or adapter.model.adapter is None or adapter.model.base_digest != model_manifest.digest:
            raise ArtifactError(f"{job.adapter_dir}: not an adapter of the model in {job.model_dir}. Name the base it was trained on.")
        attach_adapter(model, adapter.model.adapter)
        load_tensors(model, load_file(job.adapter_dir / ADAPTER_NAME))
        parents["adapter"] = adapter.digest
    fresh_folder(job.output_dir)
    prompts = read_prompts(job.tokens_dir, job.limit_rows)
    answers = answer_all(model, load_codec(job.model_dir), facts, prompts, job)
    write_answers(job.output_dir, answers)
    if job.score_expected:
        write_expected(job.output_dir, expected_logprobs(model, prompts))
    write_manifest(job.output_dir, "answers", job.provenance, parents=parents)


def answer_all(model: Any, codec: ChatCodec, facts: ModelFacts, prompts: Sequence[Prompt], job: PredictJob) -> list[Answer]:
    """Answers in batches of prompts of similar length. Raises ConfigError for a prompt that fills the context."""
    answers: dict[int, Answer] = {}
    progress = Progress(job.progress_file, "answers")
    by_length = sorted(prompts, key=lambda prompt: (len(prompt.ids), prompt.row))
    room = facts.context_tokens - max((len(prompt.ids) for prompt in prompts), default=0)
    if room < 1:
        raise ConfigError(f"the longest prompt leaves no room in a context of {facts.context_tokens} tokens. Lower data.max_tokens.")
    for start in range(0, len(by_length), job.batch_rows):
        batch = by_length[start : start + job.batch_rows]
        made = generate.greedy_answers(model, [prompt.ids for prompt in batch], facts.stop_ids, min(job.max_new_tokens, room))
        for prompt, (ids, ended) in zip(batch, made, strict=True):
            answer = Answer(row=prompt.row, ids=tuple(ids), text=codec.decode(ids), finish_reason="stop" if ended else "length")
            answers[prompt.row] = answer
        progress.report(len(answers), len(prompts))
    return [answers[prompt.row] for prompt in prompts]


if __name__ == "__main__":
    run_program(PredictJob, predict)
