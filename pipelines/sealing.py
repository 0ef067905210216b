"""Signs what is promoted: the model with its certificate and its bill of materials, and the certificate itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from infra.artifact_store import open_store
from infra.contracts import verify
from infra.errors import ConfigError
from infra.settings import Settings
from infra.signing import Seal, UnsignedError, check_seal, public_file, seal, signing_key, trusted_keys
from pipelines.proof.certificate import CERTIFICATE_NAME
from pipelines.sbom import bill
from pipelines.step import Artifact

SBOM_NAME = "sbom.cdx.json"


def seal_promoted(
    settings: Settings, name: str, model: Artifact, certificate: Artifact, artifacts: Mapping[str, Artifact], said: Mapping[str, Any]
) -> Seal:
    """Signs a model that is about to be promoted, with `said` of it, such as its gates and, where it was forced, who did so and why.

    Raises ArtifactError where a file is not what its manifest says, ConfigError where the private key cannot be used.
    """
    key = signing_key(settings.signing_key_file, may_make=settings.signing_key is None)
    verify(model.path)
    verify(certificate.path)
    digest = model.manifest.digest
    documents = {
        CERTIFICATE_NAME: (certificate.path / CERTIFICATE_NAME).read_bytes(),
        SBOM_NAME: json.dumps(bill(name, digest[:16], model, artifacts), indent=1, sort_keys=True, ensure_ascii=False).encode(),
    }
    about = {"artifact_digest": digest, "certificate_digest": certificate.manifest.digest, "name": name, **said}
    seal(certificate.path, key, {"artifact_digest": certificate.manifest.digest, "name": name}, {})
    made = seal(model.path, key, about, documents)
    if settings.store:  # the artifacts went there before they were sealed
        store = open_store(settings.store)
        store.push(certificate.path)
        store.push(model.path)
    return made


def seal_by_hand(settings: Settings, folder: Path, said: Mapping[str, Any] = MappingProxyType({})) -> Seal:
    """Signs an artifact at a person's word, with what is `said` of it. Raises what `seal_promoted` does."""
    manifest = verify(folder)
    key = signing_key(settings.signing_key_file, may_make=settings.signing_key is None)
    return seal(folder, key, {"artifact_digest": manifest.digest, "by_hand": True, **said}, {})


def seal_unless_sealed(settings: Settings, folder: Path, said: Mapping[str, Any]) -> None:
    """Signs an artifact by hand where this machine's key has not signed it yet. Raises ArtifactError where it was altered since."""
    try:
        check_seal(folder, trusted_keys(public_file(settings.signing_key_file)))
    except (UnsignedError, ConfigError):  # no signature that counts, or no key yet
        seal_by_hand(settings, folder, said)
