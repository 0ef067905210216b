"""A whole small run, step by step as the runner does it, of which one step may go wrong.

- The steps, the store and the programs are the real ones; the programs run in this process, since loading torch and OpenVINO for each of
  fourteen steps would take most of the time. Training runs in this process too, without Ray.
- Artifacts are content-addressed, so a run with a fault makes again only what comes after it.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from infra.config import parse
from infra.contracts import MANIFEST_NAME, Manifest, read_manifest, write_manifest
from infra.errors import SlipwayError
from infra.files import read_json
from infra.process import Job
from infra.provenance import Provenance
from infra.settings import Settings
from pipelines import runner
from pipelines.display import Display
from pipelines.plan import build_steps
from pipelines.spec import Spec
from pipelines.step import Artifact, Step, StepContext
from pipelines.steps.choose import CANDIDATES_NAME

PROGRAMS = {
    "pipelines.proof.asking": "ask",
    "training.data.rows": "prepare_rows",
    "training.base": "prepare_base",
    "training.data.render": "render",
    "training.finetune": "finetune",
    "training.merge": "merge",
    "training.predict": "predict",
    "training.score": "score",
    "serving.quantize.export": "export",
    "serving.quantize.openvino": "quantize",
    "serving.predict": "predict",
    "serving.score": "score",
}
"""The function of each program, which takes its job."""
ANSWER = "the lamp is red"
TRAIN_ROWS, HELDOUT_ROWS = 40, 4


@dataclass(frozen=True)
class Place:
    """What a fault may look at while it does its harm."""

    folder: Path
    """The output of the step that goes wrong."""
    inputs: dict[str, Artifact]
    """What the step was given."""
    foreign: Path
    """Home of a run on other rows and another base, which made all its artifacts."""

    def foreign_artifact(self, step: str) -> Path:
        """The other run's output of a step."""
        (found,) = (self.foreign / "artifacts").glob(f"{step}-????????????????")
        return found


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong in one step."""

    name: str
    step: str
    harm: Callable[[Place], None]
    """Changes the step's output after the step has made it."""
    named: str
    """What the refusal must say, as a regular expression."""
    is_noticed: bool = False
    """Whether the manifest still tells of the output before the harm, as when a disk or a person did it; else the step believes in it."""
    asks_live: bool = False
    """Whether only the running server shows it."""


@dataclass(frozen=True)
class Verdict:
    """Whether the run would be promoted, and all that speaks against it."""

    passed: bool
    reasons: str


def make_spec(folder: Path, model: Path, seed: int, asks_live: bool = False) -> Spec:
    """A run that teaches the toy one answer; `seed` decides the rows, the training and the chats of the certificate."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, count, first in (("train", TRAIN_ROWS, 0), ("heldout", HELDOUT_ROWS, TRAIN_ROWS)):
        lines = [json.dumps(_row(seed, number)) + "\n" for number in range(first, first + count)]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    told = {
        "name": "toy",
        "base_model": f"file:{model}",
        "dataset": {"type": "files", "train": str(folder / "train.jsonl"), "heldout": str(folder / "heldout.jsonl")},
        "train": {"precision": "fp32", "lora": {"rank": 8}, "batch_rows": 8, "epochs": 6, "learning_rate": 1e-2, "seed": seed},
        "quantize": {"formats": ["openvino-int8", "openvino-int4"]},
        "evaluate": {"metrics": ["exact_match_text"], "max_new_tokens": 14},
        "prove": {"heldout_prompts": 4, "max_new_tokens": 14, "live": asks_live, "seed": seed},
        # What the toy scores proves nothing; the certificate and the receipt decide here.
        "gates": {"min_score": 0, "min_gain": -1, "max_quantization_drop": 1, "min_merge_agreement": 0},
    }
    return parse(Spec, told, "toy")


def _row(seed: int, number: int) -> dict[str, Any]:
    asked = f"turn the lamp {('on', 'off')[number % 2]} {'please ' * ((number + seed) % 5)}{seed * 100 + number}"
    turns = [("system", "answer with a colour"), ("user", asked), ("assistant", ANSWER)]
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def toy_run(home: Path, spec: Spec, fault: Fault | None = None, foreign: Path | None = None) -> Verdict:
    """Runs all steps, one of them with its fault, and gives the gates' verdict, or the error that ended the run before."""
    settings = Settings(home=home, tracking_uri="sqlite:///unused")
    steps = [_here(step, fault, foreign) for step in build_steps(spec)]
    try:
        outcome = runner.run(settings, steps, home / "run", Provenance(), None, Display(quiet=True))
    except SlipwayError as error:
        return Verdict(False, error.message)
    choice = read_json(outcome.artifacts["gate"].path / CANDIDATES_NAME)
    refusals = [f"{gate['name']}: {gate['detail']}" for each in choice["candidates"] for gate in each["gates"] if not gate["passed"]]
    return Verdict(choice["passed"] and not refusals, "\n".join(dict.fromkeys(refusals)))


def _here(step: Step, fault: Fault | None, foreign: Path | None) -> Step:
    """The step with its programs in this process, and with the fault where it is this step's."""
    harm = fault if fault is not None and fault.step == step.name else None

    def run(config: Any, context: StepContext) -> None:
        step.run(config, replace(context, run_program=_run_here))
        if harm is not None:
            assert foreign is not None
            manifest = read_manifest(context.output_dir)
            harm.harm(Place(context.output_dir, dict(context.inputs), foreign))
            if not harm.is_noticed:
                believe(context.output_dir, manifest)

    check = None if harm else step.check  # the harm is done behind the step's back, after it has looked
    marks = {"fault": harm.name} if harm else {}
    return replace(step, run=run, check=check, source_digests={**step.source_digests, **marks})


def believe(folder: Path, manifest: Manifest) -> None:
    """Writes the manifest anew, as a step that does not know of its fault would: over the files as they are now."""
    told = read_manifest(folder) if (folder / MANIFEST_NAME).is_file() else manifest
    (folder / MANIFEST_NAME).unlink(missing_ok=True)
    write_manifest(folder, told.kind, told.provenance, told.model, told.parents)


def _run_here(module: str, job: Job) -> None:
    getattr(importlib.import_module(module), PROGRAMS[module])(job)
