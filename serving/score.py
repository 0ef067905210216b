"""`python -m serving.score --config F`: what the model that will be served makes of the chats on which the stages are compared."""

from __future__ import annotations

import numpy

from infra.cases import Ask, Forced, asks, encode_case, read_cases, read_scored, scored_file, write_lines
from infra.chat import load_codec
from infra.errors import ArtifactError
from infra.files import read_json
from infra.process import Progress, run_program
from serving.config import ScoreJob
from serving.engines.registry import verify_model
from serving.forced.opening import Run, open_model

STAGE = "served"
CONFIG_NAME = "config.json"


def score(job: ScoreJob) -> None:
    """Writes `served.jsonl`. Raises ArtifactError where the model is not what its manifest says or its engine cannot read it."""
    manifest = verify_model(job.model_dir, job.serve)
    if manifest.model is None:
        raise ArtifactError(f"{job.model_dir}: its manifest holds no model facts. Run the step that makes it again.")
    codec, cases = load_codec(job.model_dir), read_cases(job.cases_dir)
    vocabulary_tokens = int(read_json(job.model_dir / CONFIG_NAME)["vocab_size"])
    reference = read_scored(job.reference_file.parent, job.reference_file.stem)
    progress = Progress(job.progress_file, "chats")
    run = open_model(job.model_dir, job.serve)
    scored = []
    for number, case in enumerate(cases, start=1):
        told, found = reference[case.name], encode_case(codec, case, vocabulary_tokens)
        if told.answer_ids is not None:
            case = case.model_copy(update={"greedy_ids": told.answer_ids, "has_ended": told.has_ended})
        wanted = asks(case, found, manifest.model.stop_ids[0], told) if run else []
        scored.append(found.model_copy(update={"forced": tuple(force(run, ask) for ask in wanted if run)}))
        progress.report(number, len(cases))
    job.output_dir.mkdir(parents=True, exist_ok=True)
    write_lines(scored_file(job.output_dir, STAGE), scored)


def force(run: Run, ask: Ask) -> Forced:
    """What the model says of one answer, of A tokens."""
    logprobs = run(ask.ids, len(ask.answer_ids))
    ids, top = numpy.asarray(ask.answer_ids)[:, None], numpy.asarray(ask.top_ids, dtype=numpy.int64)
    return Forced(
        source=ask.source,
        ids=ask.answer_ids,
        logprobs=tuple(numpy.take_along_axis(logprobs, ids, axis=1)[:, 0].tolist()),
        best_ids=tuple(logprobs.argmax(axis=-1).tolist()),
        top_ids=ask.top_ids,
        top_logprobs=tuple(map(tuple, numpy.take_along_axis(logprobs, top, axis=1).tolist())),
    )


if __name__ == "__main__":
    run_program(ScoreJob, score)
