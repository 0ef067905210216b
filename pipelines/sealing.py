"""Signs what is promoted: the model with its certificate and its bill of materials, and the certificate itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infra import uploads
from infra.contracts import verify
from infra.errors import ArtifactError, ConfigError
from infra.registry import RegisteredVersion
from infra.settings import Settings
from infra.signing import Seal, check_seal, public_file, seal, signing_key, trusted_keys
from pipelines.proof.certificate import CERTIFICATE_NAME
from pipelines.sbom import bill
from pipelines.step import Artifact

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

SBOM_NAME = "sbom.cdx.json"


def seal_promoted(
    settings: Settings, name: str, model: Artifact, certificate: Artifact, artifacts: Mapping[str, Artifact], said: Mapping[str, Any]
) -> Seal:
    """Signs a model that is about to be promoted, with `said` of it, such as its gates and, where it was forced, who did so and why.

    Raises ArtifactError where a file is not what its manifest says, ConfigError where the private key cannot be used.
    """
    digest = model.manifest.digest
    if (found := _own_seal(settings, model.path)) and found.predicate.get("certificate_digest") == certificate.manifest.digest:
        return found
    key = signing_key(settings.signing_key_file, may_make=settings.signing_key is None)
    verify(model.path)
    verify(certificate.path)
    documents = {
        CERTIFICATE_NAME: (certificate.path / CERTIFICATE_NAME).read_bytes(),
        SBOM_NAME: json.dumps(bill(name, digest[:16], model, artifacts), indent=1, sort_keys=True, ensure_ascii=False).encode(),
    }
    about = {"artifact_digest": digest, "certificate_digest": certificate.manifest.digest, "name": name, **said}
    seal(certificate.path, key, {"artifact_digest": certificate.manifest.digest, "name": name}, {})
    return seal(model.path, key, about, documents)


def seal_by_hand(settings: Settings, folder: Path, said: Mapping[str, Any] | None = None) -> Seal:
    """Signs an artifact at a person's word, with `said` of it. Raises what `seal_promoted` does."""
    manifest = verify(folder)
    key = signing_key(settings.signing_key_file, may_make=settings.signing_key is None)
    return seal(folder, key, {**(said or {}), "artifact_digest": manifest.digest, "by_hand": True}, {})


def seal_version(settings: Settings, mlflow: MlflowClient, version: RegisteredVersion, note: Mapping[str, str]) -> None:
    """Signs a version that is promoted by command, unless its run has signed it. Raises what `seal_promoted` does."""
    folder = version.folder if version.is_local else uploads.download(mlflow, version.run_id, version.digest, settings.artifacts_dir)
    if _own_seal(settings, folder) is not None:
        return
    seal_by_hand(settings, folder, note)
    if not version.is_local:
        uploads.upload_beside(mlflow, version.run_id, folder, settings.staging_dir)


def _own_seal(settings: Settings, folder: Path) -> Seal | None:
    """What this machine's own key has signed of a folder, where that is good."""
    try:
        return check_seal(folder, trusted_keys(public_file(settings.signing_key_file)))
    except (ArtifactError, ConfigError):
        return None
