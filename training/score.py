"""`python -m training.score --config F`: what the base, the trained and the merged model make of the same chats.

Each is forced through the same answers, so that log-probabilities can be compared token by token; the trained model and the merged one
also answer by themselves where nobody has asked them yet. The merge and the rendering are computed a second time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load_file

from infra.cases import Ask, Case, Scored, asks, encode_case, read_cases, scored_file, write_lines
from infra.chat import ChatCodec, load_codec
from infra.contracts import Manifest, ModelFacts, verify
from infra.errors import ArtifactError
from infra.files import write_json_atomic
from infra.process import Progress, run_program
from training import generate
from training.adapter import ADAPTER_NAME
from training.audit import audit_merge, audit_rendering
from training.config import ScoreJob
from training.folders import fresh_folder
from training.forced import BATCH_TOKENS, force
from training.lora import load_tensors
from training.model import attach_adapter, load_base

FINDINGS_NAME = "findings.json"
NUM_STAGES = 4


@dataclass(frozen=True)
class Stage:
    """One model in memory, with what its own folder says of it."""

    name: str
    model: Any
    codec: ChatCodec
    facts: ModelFacts


def score(job: ScoreJob) -> None:
    """Writes `<stage>.jsonl` for each stage, and findings.json. Raises ArtifactError where a folder is not what its manifest says."""
    base, merged = verify(job.base_dir, ("base",)), verify(job.merged_dir, ("merged",))
    adapter = verify(job.adapter_dir, ("adapter",)) if job.adapter_dir else None
    cases = read_cases(job.cases_dir)
    fresh_folder(job.output_dir)
    progress = Progress(job.progress_file, "stages")
    stage = open_stage("base", job, base)
    heldout = [case for case in cases if case.kind == "heldout"]
    _write(job, stage, run_stage(stage, heldout, None, job.max_new_tokens))
    progress.report(1, NUM_STAGES)
    reference = None
    if adapter is not None:
        stage = with_adapter(stage, job, adapter)
        reference = _write(job, stage, run_stage(stage, cases, None, job.max_new_tokens))
        cases = [answered(case, reference[case.name]) for case in cases]
    progress.report(2, NUM_STAGES)
    stage = open_stage("merged", job, merged)
    _write(job, stage, run_stage(stage, cases, reference, job.max_new_tokens))
    progress.report(3, NUM_STAGES)
    write_json_atomic(job.output_dir / FINDINGS_NAME, findings(job, base, adapter))
    progress.report(NUM_STAGES, NUM_STAGES)


def open_stage(name: str, job: ScoreJob, manifest: Manifest) -> Stage:
    """A base or merged model in fp32, in which two models differ only where their weights do."""
    folder = job.base_dir if name == "base" else job.merged_dir
    assert manifest.model is not None
    return Stage(name, load_base(folder, torch.float32), load_codec(folder), manifest.model)


def with_adapter(base: Stage, job: ScoreJob, adapter: Manifest) -> Stage:
    """The base, which is changed, with the adapter on it. Raises ArtifactError where it is not an adapter of that base."""
    assert job.adapter_dir is not None
    if adapter.model is None or adapter.model.adapter is None:
        raise ArtifactError(f"{job.adapter_dir}: its manifest holds no facts of an adapter. Train it again.")
    attach_adapter(base.model, adapter.model.adapter)
    load_tensors(base.model, load_file(job.adapter_dir / ADAPTER_NAME))
    return Stage("adapter", base.model, base.codec, base.facts)


def run_stage(stage: Stage, cases: Sequence[Case], reference: dict[str, Scored] | None, max_new_tokens: int) -> dict[str, Scored]:
    """What one stage makes of each case; without a reference it is one itself, or the base."""
    scored = {case.name: encode_case(stage.codec, case, stage.model.config.vocab_size) for case in cases}
    if stage.name != "base":
        scored |= _answers(stage, [scored[case.name] for case in cases if case.kind == "adversarial"], max_new_tokens)
    wanted: list[Ask] = []
    for case in cases:
        known = case if reference is not None or stage.name == "base" else answered(case, scored[case.name])
        told = reference.get(case.name) if reference is not None else None
        wanted += asks(known, scored[case.name], stage.facts.stop_ids[0], told)
    for name, forced in force(stage.model, wanted):
        scored[name] = scored[name].model_copy(update={"forced": (*scored[name].forced, forced)})
    return scored


def answered(case: Case, scored: Scored) -> Case:
    """The case with the trained model's own answer, where it has given one."""
    if scored.answer_ids is None:
        return case
    return case.model_copy(update={"greedy_ids": scored.answer_ids, "has_ended": scored.has_ended})


def _answers(stage: Stage, asked: Sequence[Scored], max_new_tokens: int) -> dict[str, Scored]:
    """Greedy answers to prompts that nobody has answered; a refused one has none."""
    by_length = sorted((each for each in asked if each.prompt_ids), key=lambda each: (len(each.prompt_ids), each.name))
    found = {}
    while by_length:
        width = len(by_length[0].prompt_ids) + max_new_tokens
        batch = [each for each in by_length if len(each.prompt_ids) <= 2 * width][: max(1, BATCH_TOKENS // width)]
        by_length = by_length[len(batch) :]
        room = stage.facts.context_tokens - max(len(each.prompt_ids) for each in batch)
        made = generate.greedy_answers(stage.model, [each.prompt_ids for each in batch], stage.facts.stop_ids, min(max_new_tokens, room))
        for each, (ids, has_ended) in zip(batch, made, strict=True):
            found[each.name] = each.model_copy(update={"answer_ids": tuple(ids), "has_ended": has_ended})
    return found


def findings(job: ScoreJob, base: Manifest, adapter: Manifest | None) -> dict[str, Any]:
    """What is wrong with merge and rendering; `merge` is absent where nothing was merged."""
    assert base.model is not None
    codec = load_codec(job.base_dir)
    found = {"rendering": audit_rendering(job.tokens_dir, job.rows_dir, codec, base.model.stop_ids, job.audited_rows, job.seed)}
    if adapter is not None and job.adapter_dir is not None and adapter.model is not None and adapter.model.adapter is not None:
        limit = job.audited_gb * (1 << 30)
        found["merge"] = audit_merge(job.base_dir, job.adapter_dir, job.merged_dir, adapter.model.adapter, limit, job.seed)
    return found


def _write(job: ScoreJob, stage: Stage, scored: dict[str, Scored]) -> dict[str, Scored]:
    write_lines(scored_file(job.output_dir, stage.name), scored.values())
    return scored


if __name__ == "__main__":
    run_program(ScoreJob, score)
