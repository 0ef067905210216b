"""Collects what every stage makes of the chats: starts the programs of both stacks and the server, and reads what they leave."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from infra.answers import Answer, Prompt, read_answers, read_lines, read_prompts
from infra.cases import CASES_NAME, Case, Scored, read_scored, scored_file, write_lines
from infra.chat import load_codec
from infra.files import read_json
from pipelines.proof import adversarial
from pipelines.proof.answers import Spoken
from pipelines.proof.asking import ANSWERS_NAME, AskJob
from pipelines.proof.endpoint import LiveAnswer
from pipelines.proof.leaks import HELDOUT_NAME
from pipelines.step import Artifact, StepContext
from serving import config as serving
from serving.formats import FormatConfig
from training import config as training

FINDINGS_NAME = "findings.json"
SERVED_STAGE = "served"


@dataclass(frozen=True)
class Candidate:
    """One model that may be served."""

    name: str
    step: str
    """The step that makes it."""
    serve: serving.ServeConfig
    """The engine that serves it, and how."""
    wanted: FormatConfig
    """How its weights are to be stored."""


@dataclass
class Evidence:
    """What was found, by stage and by case."""

    cases: list[Case]
    scored: dict[str, dict[str, Scored]] = field(default_factory=dict)
    findings: dict[str, Any] = field(default_factory=dict)
    live: dict[str, dict[str, LiveAnswer]] = field(default_factory=dict)
    answers: dict[str, dict[int, Answer]] = field(default_factory=dict)
    """Answers to the held-out rows that other steps made, by the row's number."""

    def spoken(self, stage: str) -> dict[str, Spoken]:
        """The greedy answers of a stage: those of its own step to held-out rows, and those that it was asked for now."""
        found = {}
        for case in self.cases:
            own = self.scored.get(stage, {}).get(case.name)
            if case.row is not None and (answer := self.answers.get(stage, {}).get(case.row)) is not None:
                found[case.name] = Spoken(answer.ids, answer.finish_reason == "stop")
            elif own is not None and own.answer_ids is not None:
                found[case.name] = Spoken(own.answer_ids, own.has_ended)
        return found


def choose_cases(
    inputs: Mapping[str, Artifact], trained: str, num_heldout: int, long_tokens: int, room_tokens: int, seed: int
) -> list[Case]:
    """A seeded part of the held-out rows, with what the trained model answered, and the adversarial chats."""
    tokens, rows = inputs["render"].path, inputs["rows"].path
    prompts = read_prompts(tokens)
    chosen = sorted(random.Random(seed).sample(prompts, min(num_heldout, len(prompts))), key=lambda prompt: prompt.row)
    answers = {answer.row: answer for answer in read_answers(inputs[f"predict-{trained}"].path)}
    lines = _lines(rows / HELDOUT_NAME, {prompt.row for prompt in chosen})
    base = inputs["base"]
    codec, facts = load_codec(base.path), base.manifest.model
    assert facts is not None
    heldout = [_heldout(prompt, lines[prompt.row], answers[prompt.row]) for prompt in chosen]
    stops = [codec.token_text(each) for each in facts.stop_ids]
    return [*heldout, *adversarial.cases(codec, stops, min(long_tokens, facts.context_tokens - room_tokens), seed)]


def _lines(path: Path, wanted: set[int]) -> dict[int, Any]:
    with path.open(encoding="utf-8") as stream:
        return {number: json.loads(line) for number, line in enumerate(stream) if number in wanted}


def _heldout(prompt: Prompt, row: Mapping[str, Any], answer: Answer) -> Case:
    """One held-out row up to its last answer."""
    messages = row["messages"]
    last = max(index for index, message in enumerate(messages) if message["role"] == "assistant")
    return Case(
        name=f"held-out {prompt.row}",
        kind="heldout",
        messages=tuple(messages[:last]),
        tools=tuple(row.get("tools") or ()),
        row=prompt.row,
        rendered_ids=prompt.ids,
        expected_ids=prompt.expected_ids,
        greedy_ids=answer.ids,
        has_ended=answer.finish_reason == "stop",
    )


def gather(
    context: StepContext, cases: list[Case], trained: str, candidates: Sequence[Candidate], limits: tuple[int, int], asks_live: bool
) -> Evidence:
    """Runs everything; `limits` are the most tokens of an answer to a held-out row and to another chat."""
    folder = context.output_dir
    write_lines(folder / CASES_NAME, cases)
    found = Evidence(cases)
    _score_training(context, found, limits[1])
    for name, artifact in context.inputs.items():
        if name.startswith("predict-"):
            found.answers[name.removeprefix("predict-")] = {answer.row: answer for answer in read_answers(artifact.path)}
    for candidate in candidates:
        _score_served(context, found, trained, candidate)
    if asks_live:
        for candidate in candidates:
            _ask_live(context, found, candidate, limits)
    return found


def _score_training(context: StepContext, found: Evidence, max_new_tokens: int) -> None:
    inputs, folder = context.inputs, context.output_dir / "training"
    adapter = inputs["train"] if inputs["train"].manifest.kind == "adapter" else None
    job = context.job(
        training.ScoreJob,
        base_dir=inputs["base"].path,
        adapter_dir=adapter.path if adapter else None,
        merged_dir=context.input_of_kind("merged").path,
        tokens_dir=inputs["render"].path,
        rows_dir=inputs["rows"].path,
        cases_dir=context.output_dir,
        max_new_tokens=max_new_tokens,
    )
    context.run_program("training.score", job.model_copy(update={"output_dir": folder}))
    for stage in ("base", *(["adapter"] if adapter else []), "merged"):
        found.scored[stage] = read_scored(folder, stage)
    found.findings = read_json(folder / FINDINGS_NAME)


def _score_served(context: StepContext, found: Evidence, trained: str, candidate: Candidate) -> None:
    folder = context.output_dir / candidate.name
    job = context.job(
        serving.ScoreJob,
        model_dir=context.inputs[candidate.step].path,
        cases_dir=context.output_dir,
        reference_file=scored_file(context.output_dir / "training", trained),
        serve=candidate.serve,
    )
    context.run_program("serving.score", job.model_copy(update={"output_dir": folder}))
    found.scored[candidate.name] = read_scored(folder, SERVED_STAGE)


def _ask_live(context: StepContext, found: Evidence, candidate: Candidate, limits: tuple[int, int]) -> None:
    """Starts the server, as it is started to serve, and stops it again."""
    folder = context.output_dir / candidate.name
    job = context.job(
        AskJob,
        model_dir=context.inputs[candidate.step].path,
        cases_dir=context.output_dir,
        serve=candidate.serve,
        heldout_tokens=limits[0],
        adversarial_tokens=limits[1],
    )
    context.run_program("pipelines.proof.asking", job.model_copy(update={"output_dir": folder}))
    answers = [LiveAnswer.model_validate_json(line) for line in read_lines(folder / ANSWERS_NAME)]
    found.live[candidate.name] = {answer.name: answer for answer in answers}
