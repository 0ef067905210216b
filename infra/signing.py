"""Signatures of artifacts: who vouches that a folder is what was promoted.

- Signed is the digest of manifest.json, which holds that of every file, and those of the documents beside it (certificate, SBOM).
- The form is a DSSE envelope around an in-toto statement, with ed25519, so that other tools can read it.
  Sources: https://github.com/secure-systems-lab/dsse/blob/v1.0.0/protocol.md, https://github.com/in-toto/attestation v1, RFC 8032.
- It lies in the folder `seal`, which the manifest does not name: a signature comes after the artifact and changes no digest of it.
- A private key never leaves its file, which only its owner may read; it is no part of any message, log or tracker.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)
from pydantic import Field, ValidationError

from infra.config import Config
from infra.contracts import MANIFEST_NAME, SEAL_DIR
from infra.errors import ArtifactError, ConfigError
from infra.files import sha256_bytes, sha256_file, write_bytes_atomic, write_json_atomic

SIGNATURE_NAME = "signature.json"
PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "urn:slipway:seal:1"
PRIVATE_MODE = 0o600
GROUP, ALL = 0o070, 0o007
PEM_END = "-----END PUBLIC KEY-----"


class UnsignedError(ArtifactError):
    """A folder has no signature, or none that counts."""


class Seal(Config):
    """What a signature says."""

    key_id: str
    """sha256 of the public key that signed."""
    predicate: dict[str, Any] = Field(default_factory=dict)
    """What was said of the artifact when it was signed."""
    documents: tuple[str, ...] = ()
    """Names of the signed documents beside the signature."""


class _Signature(Config):
    keyid: str
    sig: str


class _Envelope(Config):
    payloadType: str
    payload: str
    signatures: tuple[_Signature, ...]


def signing_key(path: Path, may_make: bool) -> Ed25519PrivateKey:
    """The private key in a file, made on first use where that is allowed; the public one is then written beside it.

    Raises ConfigError where there is none, where others may read it, or where it is no ed25519 key.
    """
    if not path.is_file():
        if not may_make:
            raise ConfigError(f"{path}: no such file, and SLIPWAY_SIGNING_KEY names it. Put an ed25519 key in PEM there, or unset it.")
        _make_key(path)
    if _others_may_read(path):
        raise ConfigError(f"{path}: others may read this private key. Run `chmod 600 {path}`, and make a new one if they may have.")
    try:
        key = load_pem_private_key(path.read_bytes(), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"{path}: not a private key in PEM without a password. An ed25519 key is needed.") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(f"{path}: a key of another kind. An ed25519 key is needed: `openssl genpkey -algorithm ed25519`.")
    return key


def _others_may_read(path: Path) -> bool:
    """Whether others than this process's user may.

    A file that another user lent to a group of ours is as closed as we can have it: so Kubernetes mounts a Secret, root's and the pod's.
    """
    status = path.stat()
    return bool(status.st_mode & ALL) or (bool(status.st_mode & GROUP) and status.st_uid == os.getuid())


def public_file(private_file: Path) -> Path:
    """Where the public key of a private one lies."""
    return private_file.with_suffix(".pub")


def _make_key(path: Path) -> None:
    """Writes a new key, unless another process was faster."""
    path.parent.mkdir(parents=True, exist_ok=True)
    key = Ed25519PrivateKey.generate()
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, PRIVATE_MODE)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        try:
            os.link(partial, path)
        except FileExistsError:
            return
    finally:
        partial.unlink()
    write_bytes_atomic(public_file(path), _pem(key.public_key()))


def trusted_keys(path: Path) -> dict[str, Ed25519PublicKey]:
    """The public keys in a file, one after the other in PEM, by their id. Raises ConfigError where it holds none."""
    if not path.is_file():
        raise ConfigError(f"{path}: no such file. A file of trusted public keys is needed (serve.trusted_keys_file), in PEM.")
    parts = path.read_text(encoding="utf-8", errors="replace").split(PEM_END)[:-1]
    try:
        keys = [load_pem_public_key(f"{part[part.index('-----BEGIN') :]}{PEM_END}\n".encode()) for part in parts]
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"{path}: not public keys in PEM ({error}). Write them one after the other.") from error
    wrong = [key for key in keys if not isinstance(key, Ed25519PublicKey)]
    if wrong or not keys:
        raise ConfigError(f"{path}: {len(wrong)} of {len(keys)} keys are not ed25519. Public keys of that kind are needed.")
    return {key_id(key): key for key in keys if isinstance(key, Ed25519PublicKey)}


def key_id(key: Ed25519PublicKey) -> str:
    """sha256 of a public key, in hex."""
    return sha256_bytes(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo))


def seal(folder: Path, key: Ed25519PrivateKey, predicate: Mapping[str, Any], documents: Mapping[str, bytes]) -> Seal:
    """Signs a complete artifact with documents beside it, and `predicate` said of both; a seal that was there is replaced.

    The caller has checked the artifact's files.
    """
    place = folder / SEAL_DIR
    for name, content in documents.items():
        write_bytes_atomic(place / name, content)
    subjects = {MANIFEST_NAME: sha256_file(folder / MANIFEST_NAME)}
    subjects |= {f"{SEAL_DIR}/{name}": sha256_bytes(content) for name, content in documents.items()}
    said = {**predicate, "signed_at": datetime.now(UTC).isoformat(timespec="seconds")}
    statement = {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": name, "digest": {"sha256": digest}} for name, digest in subjects.items()],
        "predicateType": PREDICATE_TYPE,
        "predicate": said,
    }
    payload = json.dumps(statement, sort_keys=True, ensure_ascii=False).encode()
    identity = key_id(key.public_key())
    signature = {"keyid": identity, "sig": base64.b64encode(key.sign(_encoded(PAYLOAD_TYPE, payload))).decode()}
    envelope = {"payloadType": PAYLOAD_TYPE, "payload": base64.b64encode(payload).decode(), "signatures": [signature]}
    write_json_atomic(place / SIGNATURE_NAME, envelope)
    return Seal(key_id=identity, predicate=said, documents=tuple(documents))


def check_seal(folder: Path, trusted: Mapping[str, Ed25519PublicKey]) -> Seal:
    """What a trusted key has signed of a folder, after checking its manifest and documents against it; files are `verify`'s part.

    Raises UnsignedError where there is no signature that counts, ArtifactError where something was altered after it was signed.
    """
    path = folder / SEAL_DIR / SIGNATURE_NAME
    if not path.is_file():
        raise UnsignedError(f"{folder}: not signed")
    try:
        envelope = _Envelope.model_validate_json(path.read_bytes())
        payload = base64.b64decode(envelope.payload, validate=True)
        signatures = {each.keyid: base64.b64decode(each.sig, validate=True) for each in envelope.signatures}
    except (ValidationError, ValueError) as error:
        raise ArtifactError(f"{path}: not a DSSE envelope. Sign the folder again.") from error
    known = next((identity for identity in signatures if identity in trusted), None)
    if known is None:
        found = ", ".join(identity[:16] for identity in signatures) or "none"
        raise UnsignedError(f"{folder}: signed by {found}, trusted are {', '.join(each[:16] for each in trusted)}")
    try:
        trusted[known].verify(signatures[known], _encoded(envelope.payloadType, payload))
    except InvalidSignature as error:
        raise ArtifactError(f"{path}: the signature of {known[:16]} does not fit; it was altered. Sign the folder again.") from error
    return _checked(folder, known, json.loads(payload))


def _checked(folder: Path, identity: str, statement: Mapping[str, Any]) -> Seal:
    """The statement's content, after checking that it is of this folder as it is now."""
    if statement.get("_type") != STATEMENT_TYPE or statement.get("predicateType") != PREDICATE_TYPE:
        raise ArtifactError(f"{folder}: what was signed is no seal of an artifact, but {statement.get('predicateType')!r}. Sign it again.")
    subjects = {each["name"]: each["digest"]["sha256"] for each in statement["subject"]}
    if MANIFEST_NAME not in subjects:
        raise ArtifactError(f"{folder}: the signature says nothing of {MANIFEST_NAME}. Sign the folder again.")
    for name, wanted in subjects.items():
        path = folder / name
        found = sha256_file(path) if path.is_file() else "absent"
        if found != wanted:
            raise ArtifactError(
                f"{path}: altered after it was signed: sha256 is {found}, {wanted} was signed. Restore it, or promote the model again."
            )
    documents = tuple(Path(name).name for name in subjects if name != MANIFEST_NAME)
    return Seal(key_id=identity, predicate=dict(statement["predicate"]), documents=documents)


def _encoded(payload_type: str, payload: bytes) -> bytes:
    """What is really signed: DSSE's pre-authentication encoding."""
    return b"DSSEv1 %d %s %d %s" % (len(payload_type), payload_type.encode(), len(payload), payload)


def _pem(key: Ed25519PublicKey) -> bytes:
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
