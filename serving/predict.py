"""The engine's greedy answers to the held-out prompts, made by the very engine that serves."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import aclosing

from infra.answers import Answer, Prompt, read_prompts, write_answers, write_expected
from infra.chat import ChatCodec, load_codec
from infra.contracts import verify, write_manifest
from infra.errors import ArtifactError
from infra.process import Progress, run_program
from serving.config import PredictJob
from serving.engines.base import Engine, Sampling
from serving.engines.registry import make_engine, verify_model
from serving.likelihood import expected_logprobs
from serving.timing import Speed, latencies_s, measure, spread, write_speed


def predict(job: PredictJob) -> None:
    """Writes the answers of `job.model_dir` to `job.output_dir`, the engine's figures where it is timed, and where asked how
    likely the expected answers are.

    Raises ArtifactError when model or prompts are not complete.
    """
    manifest = verify_model(job.model_dir, job.serve)
    tokens = verify(job.tokens_dir, ("tokens",))
    if manifest.model is None:
        raise ArtifactError(f"{job.model_dir}: its manifest holds no model facts. Run the step that makes it again.")
    prompts = read_prompts(job.tokens_dir, job.limit_rows)
    sampling = Sampling(max_tokens=job.max_new_tokens, stop_ids=manifest.model.stop_ids)
    answers, speed = asyncio.run(_answer_and_time(job, prompts, sampling))
    job.output_dir.mkdir(parents=True, exist_ok=True)
    write_answers(job.output_dir, answers)
    if job.score_expected and (expected := expected_logprobs(job.model_dir, job.serve, prompts)):
        write_expected(job.output_dir, expected)
    if job.timed_streams:
        write_speed(job.output_dir, speed)
    write_manifest(job.output_dir, "answers", job.provenance, parents={"model": manifest.digest, "tokens": tokens.digest})


async def _answer_and_time(job: PredictJob, prompts: Sequence[Prompt], sampling: Sampling) -> tuple[list[Answer], Speed]:
    """All answers, in the order of the prompts, and then the engine's figures, which it tells best when it is warm."""
    engine = make_engine(job.model_dir, job.serve)
    await engine.start()
    try:
        answers = await _answer_all(engine, prompts, sampling, load_codec(job.model_dir), Progress(job.progress_file, "rows"))
        took_s = await latencies_s(engine, spread(prompts, job.latency_rows), sampling)
        answers = [answer.model_copy(update={"latency_s": took_s.get(answer.row)}) for answer in answers]
        return answers, await measure(engine, prompts, job.timed_streams, job.max_new_tokens)
    finally:
        await engine.stop()


async def _answer_all(engine: Engine, prompts: Sequence[Prompt], sampling: Sampling, codec: ChatCodec, progress: Progress) -> list[Answer]:
    """All answers, in the order of the prompts; the engine decides how many run together."""
    num_done = 0

    async def answer(prompt: Prompt) -> Answer:
        nonlocal num_done
        made = await _answer(engine, prompt, sampling, codec)
        num_done += 1
        progress.report(num_done, len(prompts))
        return made

    return await asyncio.gather(*(answer(prompt) for prompt in prompts))


async def _answer(engine: Engine, prompt: Prompt, sampling: Sampling, codec: ChatCodec) -> Answer:
    ids: list[int] = []
    finish_reason = None
    async with aclosing(engine.generate(prompt.ids, sampling)) as chunks:
        async for chunk in chunks:
            ids += chunk.ids
            finish_reason = chunk.finish_reason
    assert finish_reason is not None, "an engine ends with a finish reason or raises"
    return Answer(row=prompt.row, ids=tuple(ids), text=codec.decode(ids), finish_reason=finish_reason)


if __name__ == "__main__":
    run_program(PredictJob, predict)
