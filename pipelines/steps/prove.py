"""prove: the certificate that what will be served is what was trained.

- All held-out answers of each model are compared with those of the trained one, row by row.
- A few chats go through every stage, the running server too: token ids, log-probabilities, answers and their ends must be the same as far
  as the precision allows (`pipelines/proof`).
- Nothing is refused here: the gates read the certificate, so that a refusal is reported whole.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from infra.answers import Answer, Prompt, read_answers, read_prompts
from infra.config import Config
from infra.contracts import AdapterFacts, Kind, write_manifest
from infra.evaluation.scorers import score_rows
from infra.evaluation.statistics import agreement, paired_difference
from infra.files import write_json_atomic
from pipelines.proof.asking import MODEL_NAME
from pipelines.proof.certificate import CERTIFICATE_NAME, certificate_gates, checks_of, document
from pipelines.proof.evidence import Candidate, choose_cases, gather
from pipelines.spec import ProveConfig, Spec
from pipelines.step import Step, StepContext
from pipelines.steps.evaluate import model_names, scorer_digests
from serving.formats import WeightFormat
from serving.limits import with_engine_of

__all__ = ["CERTIFICATE_NAME", "ProveIdentity", "certificate_gates", "compare", "run", "step"]

MAX_DIFFERENCES_SHOWN = 20


class ProveIdentity(Config):
    """Identity of a certificate."""

    metric: str
    confidence: float
    max_new_tokens: int
    prove: ProveConfig
    precision: str


@dataclass(frozen=True)
class Plan:
    """What the step is told of the spec beside its identity, which follows from its inputs."""

    reference: str
    names: tuple[str, ...]
    candidates: tuple[Candidate, ...]
    adapter: AdapterFacts | None
    limit_rows: int | None


def step(spec: Spec) -> Step:
    """The step that needs the answers of what was trained, the adapter or else the merged model, and all that was made on the way."""
    config = ProveIdentity(
        metric=spec.evaluate.metrics[0],
        confidence=spec.evaluate.confidence,
        max_new_tokens=spec.evaluate.max_new_tokens,
        prove=spec.prove,
        precision=spec.serve.precision,
    )
    base, *models = model_names(spec)
    has_adapter = spec.merged_by == "merge"
    candidates = tuple(_candidate(spec, name) for name in spec.quantize.formats)
    adapter = AdapterFacts(**spec.train.lora.model_dump(exclude={"dropout"})) if has_adapter else None
    plan = Plan(models[0], tuple(models[1:]), candidates, adapter, spec.train_limit_rows)
    needs: dict[str, Kind] = {"rows": "dataset", "base": "base", "render": "tokens", "train": "adapter" if has_adapter else "merged"}
    needs |= {"merge": "merged"} if has_adapter else {}
    needs |= {candidate.step: "quantized" for candidate in candidates}
    needs |= {f"predict-{name}": "answers" for name in (base, *models)}
    return Step("prove", 4, "certificate", config, partial(run, plan), needs=needs, source_digests=scorer_digests(spec))


def _candidate(spec: Spec, name: WeightFormat) -> Candidate:
    """One model that may be served, by one replica on this machine and open to this machine only."""
    serve = with_engine_of(spec.serve, name).model_copy(
        update={"host": "127.0.0.1", "num_replicas": 1, "autoscale": None, "pools": (), "adapters": {}, "api_keys_file": None,
                "allow_unsigned": (MODEL_NAME,)}
    )  # fmt: skip
    return Candidate(name, f"quantize-{name}", serve, spec.quantize.of(name))


def run(plan: Plan, config: ProveIdentity, context: StepContext) -> None:
    """Writes certificate.json: the reference compared with every other model, and the checks of every stage."""
    shutil.rmtree(context.output_dir)
    context.output_dir.mkdir()
    room, inputs = config.prove.max_new_tokens, context.inputs
    cases = choose_cases(inputs, plan.reference, config.prove.heldout_prompts, config.prove.long_tokens, room, config.prove.seed)
    limits = (config.max_new_tokens, room)
    evidence = gather(context, cases, plan.reference, plan.candidates, limits, config.prove.live)
    checks = checks_of(evidence, inputs, plan.candidates, plan.adapter, plan.limit_rows, config.prove.tolerance)
    certificate = {
        "reference": plan.reference,
        "models": _comparisons(plan, config, context),
        **document(checks, inputs, plan.candidates, evidence, config.prove.tolerance, context.provenance.versions),
    }
    write_json_atomic(context.output_dir / CERTIFICATE_NAME, certificate)
    parents = {name: artifact.manifest.digest for name, artifact in inputs.items()}
    write_manifest(context.output_dir, "certificate", context.provenance, parents=parents)


def _comparisons(plan: Plan, config: ProveIdentity, context: StepContext) -> dict[str, Any]:
    prompts = read_prompts(context.inputs["render"].path)
    trained = read_answers(context.inputs[f"predict-{plan.reference}"].path)
    return {name: compare(prompts, trained, read_answers(context.inputs[f"predict-{name}"].path), config) for name in plan.names}


def compare(prompts: Sequence[Prompt], reference: Sequence[Answer], other: Sequence[Answer], config: ProveIdentity) -> dict[str, Any]:
    """Agreement of two models' answers and the paired difference of their scores (other minus reference)."""
    expected = [prompt.expected for prompt in prompts]
    reference_text = [answer.text for answer in reference]
    other_text = [answer.text for answer in other]
    same = agreement(reference_text, other_text, config.confidence)
    change = paired_difference(
        score_rows(other_text, expected, config.metric), score_rows(reference_text, expected, config.metric), config.confidence
    )
    differing = [
        {"row": answer.row, "reference": answer.text, "other": text, "expected": wanted}
        for answer, text, wanted in zip(reference, other_text, expected, strict=True)
        if answer.text != text
    ]
    return {
        "same_answer": {"value": same.value, "low": same.low, "high": same.high, "n": same.n},
        "score_change": {"value": change.value, "low": change.low, "high": change.high, "n": change.n},
        "num_differing": len(differing),
        "differing": differing[:MAX_DIFFERENCES_SHOWN],
    }
