"""What a promoted model is made of, as a CycloneDX bill of materials in JSON.

Written by hand: five more packages in the driver would save none of these lines. Source: https://cyclonedx.org/docs/1.6/json.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any

from infra.contracts import Manifest
from pipelines.step import Artifact

SPEC_VERSION = "1.6"
NAMESPACE = uuid.UUID("6f1f4a3e-3c5b-5f0e-9d1c-2f6b8f6f2a11")
KINDS = ("base", "dataset", "tokens", "adapter", "merged", "exported", "quantized")
"""Artifacts that a model is made of; what is said about it, such as answers and scores, is no part of it."""


def bill(name: str, version: str, model: Artifact, artifacts: Mapping[str, Artifact]) -> dict[str, Any]:
    """The bill of materials of `model`; `artifacts` are those of its run. The same model always gives the same one."""
    parts = _ancestors(model, artifacts)
    own = model.manifest
    components = [_artifact_component(step, artifact) for step, artifact in parts.items()]
    components += [_library(library, number) for library, number in sorted(own.provenance.versions.items())]
    components += [_file(file, entry.sha256) for file, entry in sorted(own.files.items())]
    return {
        "bomFormat": "CycloneDX",
        "specVersion": SPEC_VERSION,
        "serialNumber": f"urn:uuid:{uuid.uuid5(NAMESPACE, own.digest)}",
        "version": 1,
        "metadata": {
            "component": {
                "type": "machine-learning-model",
                "bom-ref": _reference(own),
                "name": name,
                "version": version,
                "hashes": _hashes(own.digest),
                "properties": _properties(own),
            }
        },
        "components": components,
        "dependencies": _dependencies(own, {artifact.manifest.digest for artifact in parts.values()}, parts),
    }


def _ancestors(model: Artifact, artifacts: Mapping[str, Artifact]) -> dict[str, Artifact]:
    """The artifacts that the model was made of, by step, however many steps back."""
    by_digest = {each.manifest.digest: (step, each) for step, each in artifacts.items() if each.manifest.kind in KINDS}
    found: dict[str, Artifact] = {}
    waiting = list(model.manifest.parents.values())
    while waiting:
        step, artifact = by_digest.get(waiting.pop(), ("", None))
        if artifact is not None and step not in found:
            found[step] = artifact
            waiting += artifact.manifest.parents.values()
    return dict(sorted(found.items()))


def _artifact_component(step: str, artifact: Artifact) -> dict[str, Any]:
    manifest = artifact.manifest
    is_model = manifest.model is not None
    named = manifest.model.base_model if manifest.kind == "base" and manifest.model else f"{step} ({manifest.kind})"
    return {
        "type": "machine-learning-model" if is_model else "data",
        "bom-ref": _reference(manifest),
        "name": named,
        "version": manifest.digest[:16],
        "hashes": _hashes(manifest.digest),
        "properties": _properties(manifest),
    }


def _library(name: str, version: str) -> dict[str, Any]:
    if name == "python":
        return {"type": "platform", "bom-ref": f"platform/{name}", "name": name, "version": version}
    return {
        "type": "library",
        "bom-ref": f"pkg:pypi/{name}@{version}",
        "name": name,
        "version": version,
        "purl": f"pkg:pypi/{name}@{version}",
    }


def _file(name: str, sha256: str) -> dict[str, Any]:
    return {"type": "file", "bom-ref": f"file/{name}", "name": name, "hashes": _hashes(sha256)}


def _hashes(sha256: str) -> list[dict[str, str]]:
    return [{"alg": "SHA-256", "content": sha256}]


def _properties(manifest: Manifest) -> list[dict[str, str]]:
    said = {"kind": manifest.kind, "git_commit": manifest.provenance.git_commit}
    if facts := manifest.model:
        said |= {"base_model": facts.base_model, "quantization": facts.quantization, "chat_template": facts.chat_template_digest}
        if facts.adapter:
            said |= {"adapter_rank": str(facts.adapter.rank), "adapter_alpha": str(facts.adapter.alpha)}
    return [{"name": f"slipway:{key}", "value": value} for key, value in said.items() if value]


def _reference(manifest: Manifest) -> str:
    return f"{manifest.kind}/{manifest.digest[:16]}"


def _dependencies(own: Manifest, known: set[str], parts: Mapping[str, Artifact]) -> list[dict[str, Any]]:
    by_digest = {each.manifest.digest: _reference(each.manifest) for each in parts.values()}
    manifests = [own, *(each.manifest for each in parts.values())]
    return [
        {"ref": _reference(each), "dependsOn": sorted({by_digest[parent] for parent in each.parents.values() if parent in known})}
        for each in manifests
    ]
