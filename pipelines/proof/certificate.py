"""The certificate: every check of every stage, from what the stages made of the chats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from infra.chat import load_codec
from infra.contracts import AdapterFacts, Manifest
from pipelines.proof.answers import check_answers
from pipelines.proof.bounds import BOUNDS, precision_of
from pipelines.proof.checks import Check, failed, listed
from pipelines.proof.differences import check_effect, check_logprobs
from pipelines.proof.encodings import check_prompt_ids, encoder_of
from pipelines.proof.evidence import Candidate, Evidence
from pipelines.proof.leaks import check_leaks
from pipelines.proof.lineage import adapter_problems, check_lineage, parent_problems
from pipelines.proof.live import check_live
from pipelines.step import Artifact
from serving.formats import FormatConfig, weight_problems

CERTIFICATE_NAME = "certificate.json"
Gate = dict[str, Any]


def live_stage(name: str) -> str:
    """The stage of a candidate's endpoint."""
    return f"{name} live"


def lineage_checks(inputs: Mapping[str, Artifact], candidates: Sequence[Candidate], adapter: AdapterFacts | None) -> list[Check]:
    """That the folders of the run belong together, and that the answers which were scored are those of its models to its prompts."""
    base, trained, tokens = inputs["base"], inputs["train"], inputs["render"]
    sources = {"base": base, "tokens": tokens}
    checks = [
        check_lineage("base", base, {}, base, answer_problems(inputs, "base", {"model": base})),
        check_lineage("tokens", tokens, {"base": base, "dataset": inputs["rows"]}, base),
    ]
    if adapter:
        answered = answer_problems(inputs, "adapter", {"model": base, "adapter": trained})
        checks.append(check_lineage("adapter", trained, sources, base, adapter_problems(trained, adapter) + answered))
        sources = {"base": base, "adapter": trained}
    merged = inputs["merge"] if adapter else trained
    checks.append(check_lineage("merged", merged, sources, base, answer_problems(inputs, "merged", {"model": merged})))
    for candidate in candidates:
        quantized = inputs[candidate.step]
        problems = weights_of(quantized.manifest, candidate.wanted) + answer_problems(inputs, candidate.name, {"model": quantized})
        checks.append(check_lineage(candidate.name, quantized, {"merged": merged}, base, problems))
    return checks


def answer_problems(inputs: Mapping[str, Artifact], name: str, models: Mapping[str, Artifact]) -> list[str]:
    """Whether the answers that were scored under `name` are those of these models, by their roles, to this run's prompts."""
    problems = parent_problems(inputs[f"predict-{name}"].manifest, {**models, "tokens": inputs["render"]})
    return [f"its answers were {problem}" for problem in problems]


def weights_of(manifest: Manifest, wanted: FormatConfig) -> list[str]:
    """What a quantized model's manifest says otherwise of its weights than the spec."""
    facts = manifest.model
    if facts is None or facts.quantization != wanted.format or facts.weights is None:
        return [f"its weights are {facts.quantization if facts else None}, the spec says {wanted.format}"]
    return weight_problems(facts.weights, wanted)


def checks_of(
    evidence: Evidence,
    inputs: Mapping[str, Artifact],
    candidates: Sequence[Candidate],
    adapter: AdapterFacts | None,
    limit_rows: int | None,
    tolerance: float,
) -> list[Check]:
    """Every check, in the order of the stages."""
    trained = "adapter" if adapter else "merged"
    checks = lineage_checks(inputs, candidates, adapter)
    checks += [check_leaks(inputs["rows"].path, limit_rows), *_finding_checks(evidence.findings)]
    checks += _training_checks(evidence, inputs, trained, tolerance)
    for candidate in candidates:
        checks += _served_checks(evidence, inputs, candidate, trained, tolerance)
    return checks


def _finding_checks(findings: Mapping[str, Any]) -> list[Check]:
    checks = []
    rendering = findings["rendering"]
    compared = f"{rendering['rows']} of {rendering['of']} training rows, rendered again"
    checks.append(listed("rendering", "tokens", compared, rendering["problems"], "the same tokens and labels"))
    if "merge" in findings:
        merge = findings["merge"]
        compared = f"{merge['tensors']} of {merge['of']} tensors, merged again"
        checks.append(listed("merge", "merged", compared, merge["problems"], "base plus adapter"))
    return checks


def _training_checks(evidence: Evidence, inputs: Mapping[str, Artifact], trained: str, tolerance: float) -> list[Check]:
    scored, cases = evidence.scored, evidence.cases
    base_dir, stop_ids = inputs["base"].path, _stop_ids(inputs)
    encoder, exact = encoder_of(base_dir), BOUNDS["f32"].times(tolerance)
    checks = [check_effect(trained, scored[trained], scored["base"], exact)]
    checks.append(check_prompt_ids(trained, cases, scored[trained], scored[trained], (encoder, encoder)))
    if trained != "merged":
        merged = encoder_of(inputs["merge"].path)
        checks.append(check_prompt_ids("merged", cases, scored[trained], scored["merged"], (encoder, merged)))
        bounds = BOUNDS["merge"].times(tolerance)
        checks.append(check_logprobs("merged", scored[trained], scored["merged"], scored["base"], bounds, trained))
    spoken = evidence.spoken(trained)
    for stage in dict.fromkeys(("base", trained, "merged")):
        checks.append(check_answers(stage, cases, evidence.spoken(stage), spoken, scored[stage], stop_ids, 2 * exact.max))
    return checks


def _served_checks(evidence: Evidence, inputs: Mapping[str, Artifact], candidate: Candidate, trained: str, tolerance: float) -> list[Check]:
    name, scored, cases = candidate.name, evidence.scored, evidence.cases
    base, folder = inputs["base"].path, inputs[candidate.step].path
    stop_ids, near = _stop_ids(inputs), BOUNDS["live"].times(tolerance)
    spoken = evidence.spoken(trained)
    checks = [check_prompt_ids(name, cases, scored[trained], scored[name], (encoder_of(base), encoder_of(folder)))]
    if any(each.forced for each in scored[name].values()):
        bounds = BOUNDS[precision_of(name)].times(tolerance)
        checks.append(check_logprobs(name, scored[trained], scored[name], scored["base"], bounds, trained))
        checks.append(check_answers(name, cases, evidence.spoken(name), spoken, scored[name], stop_ids, 2 * near.max))
    if name in evidence.live:
        facts = inputs["base"].manifest.model
        assert facts is not None
        compared = scored[name] if any(each.forced for each in scored[name].values()) else scored[trained]
        bounds = near if compared is scored[name] else BOUNDS[precision_of(name)].times(tolerance)
        checks += check_live(
            live_stage(name), cases, evidence.live[name], scored[trained], compared, spoken, load_codec(folder), stop_ids,
            facts.context_tokens, bounds,
        )  # fmt: skip
    return checks


def _stop_ids(inputs: Mapping[str, Artifact]) -> tuple[int, ...]:
    facts = inputs["base"].manifest.model
    assert facts is not None
    return facts.stop_ids


def document(
    checks: Sequence[Check],
    inputs: Mapping[str, Artifact],
    candidates: Sequence[Candidate],
    evidence: Evidence,
    tolerance: float,
    versions: Mapping[str, str],
) -> dict[str, Any]:
    """What the certificate holds beside the comparison of all held-out answers."""
    kinds = [case.kind for case in evidence.cases]
    return {
        "checks": [check.model_dump(mode="json") for check in checks],
        "passed": not failed(checks),
        "candidates": [candidate.name for candidate in candidates],
        "chats": {kind: kinds.count(kind) for kind in ("heldout", "adversarial")},
        "bounds": {name: bounds.times(tolerance).model_dump() for name, bounds in BOUNDS.items()},
        "artifacts": {name: {"kind": each.manifest.kind, "digest": each.manifest.digest} for name, each in inputs.items()},
        "versions": dict(versions),
    }


def certificate_gates(certificate: Mapping[str, Any], served: str) -> list[Gate]:
    """One gate a kind of check, over all stages that lead to the candidate `served`; a certificate without checks does not pass."""
    others = {stage for name in certificate.get("candidates", ()) if name != served for stage in (name, live_stage(name))}
    checks = [Check.model_validate(each) for each in certificate.get("checks", ())]
    relevant = [check for check in checks if check.stage not in others]
    if not any(check.stage == served for check in relevant):
        return [{"name": f"certificate of {served}", "passed": False, "detail": f"the certificate says nothing of {served}"}]
    gates = []
    for name in dict.fromkeys(check.name for check in relevant):
        group = [check for check in relevant if check.name == name]
        bad = failed(group)
        detail = "; ".join(check.line for check in bad) if bad else f"{len(group)} stage(s): {', '.join(check.stage for check in group)}"
        gates.append({"name": f"certificate: {name}", "passed": not bad, "detail": detail})
    return gates
