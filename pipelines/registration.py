"""What a run leaves in the registry: the version, its tags, its model card, and the artifact where other machines reach it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from infra import registry, tracking, uploads
from infra.contracts import read_manifest
from infra.files import read_json
from infra.provenance import git_commit
from infra.registry import RegisteredVersion
from infra.settings import Settings
from pipelines import card
from pipelines.runner import Outcome, Tracked
from pipelines.spec import Spec
from pipelines.steps.choose import chosen
from pipelines.steps.gate import GATES_NAME
from pipelines.steps.prove import CERTIFICATE_NAME, certificate_gates

CERTIFICATE_TAG = "slipway.certificate"
CERTIFICATE_DIGEST_TAG = "slipway.certificate.digest"
LINEAGE_PREFIX = "slipway.lineage."
HOLDS, FAILS = "holds", "fails"


def register(spec: Spec, outcome: Outcome, tracked: Tracked, settings: Settings) -> RegisteredVersion:
    """The version of what will be served, as challenger, with the outcome of every gate, its certificate and its lineage as tags."""
    made = chosen(outcome.artifacts)

    def publish() -> str:
        return uploads.upload(tracked.client, tracked.run_id, made.path, settings.staging_dir)

    version = registry.register(
        tracked.client,
        spec.name,
        made.path,
        made.manifest.digest,
        tracked.run_id,
        publish if tracking.is_shared(tracked.client, tracked.uri, tracked.run_id) else None,
    )
    facts = {f"{LINEAGE_PREFIX}{name}": digest for name, digest in lineage(spec, outcome).items()}
    registry.write_tags(tracked.client, version, facts | certificate_tags(outcome.artifacts["prove"].path, served(outcome)))
    registry.mark_challenger(tracked.client, version, _gates(outcome))
    return registry.lookup(tracked.client, version.name, version.version)


def has_passed(outcome: Outcome) -> bool:
    """Whether every gate lets what was chosen pass."""
    return all(gate["passed"] for gate in _gates(outcome))


def _gates(outcome: Outcome) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = read_json(outcome.artifacts["gate"].path / GATES_NAME)
    return found


def served(outcome: Outcome) -> str:
    """The weight format of what was chosen, by which certificate and gates name it."""
    facts = chosen(outcome.artifacts).manifest.model
    assert facts is not None
    assert facts.quantization is not None
    return facts.quantization


def certificate_tags(folder: Path, served: str) -> dict[str, str]:
    """Whether the certificate in a step's folder holds for what would be served, and the digest that names it."""
    gates = certificate_gates(read_json(folder / CERTIFICATE_NAME), served)
    passed = all(gate["passed"] for gate in gates)
    return {CERTIFICATE_TAG: HOLDS if passed else FAILS, CERTIFICATE_DIGEST_TAG: read_manifest(folder).digest}


def lineage(spec: Spec, outcome: Outcome) -> dict[str, str]:
    """Digests of everything that the version was made from."""
    steps = {"data": "rows", "tokens": "render", "base": "base", "adapter": "train", "merged": "merge"}
    if spec.merged_by == "train":
        steps = {"data": "rows", "tokens": "render", "base": "base", "merged": "train"}
    found = {name: outcome.artifacts[step].manifest.digest for name, step in steps.items()}
    commit = git_commit()
    return {"spec": spec.fingerprint, **found, "quantized": chosen(outcome.artifacts).manifest.digest} | (
        {"git_commit": commit} if commit else {}
    )


def describe(spec: Spec, outcome: Outcome, version: RegisteredVersion, report: Mapping[str, Any], tracked: Tracked, run_dir: Path) -> None:
    """Logs the model card to the run, and shows it as the version's description."""
    parts = card.sections(spec, report, lineage(spec, outcome), served(outcome))
    title = f"{version.name} version {version.version}"
    for path in card.write(title, parts, run_dir):
        tracked.client.log_artifact(tracked.run_id, str(path))
    tracked.client.update_model_version(version.name, version.version, card.description(title, parts, tracked.run_id))
