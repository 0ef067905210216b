"""Signatures of artifacts, the server's trust in them, and the bill of materials."""

from __future__ import annotations

import base64
import json
import stat
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from infra.contracts import FileEntry, Manifest, ModelFacts, read_manifest, verify, write_manifest
from infra.errors import ArtifactError, ConfigError
from infra.provenance import Provenance
from infra.settings import Settings
from infra.signing import UnsignedError, check_seal, public_file, seal, signing_key, trusted_keys
from pipelines.sbom import bill
from pipelines.sealing import SBOM_NAME, seal_by_hand, seal_promoted
from pipelines.step import Artifact
from serving.config import ServeConfig
from serving.trust import require_all_trusted, require_trusted

FACTS = ModelFacts(
    base_model="file:base",
    base_digest="b",
    tokenizer_digest="t",
    chat_template_digest="c",
    special_tokens={},
    context_tokens=8,
    stop_ids=(2,),
)


def make_model(folder: Path, content: str = "weights", parents: dict[str, str] | None = None) -> Artifact:
    folder.mkdir(parents=True)
    (folder / "model.bin").write_text(content)
    manifest = write_manifest(folder, "quantized", Provenance(versions={"python": "3.11", "openvino": "1"}), FACTS, parents)
    return Artifact(folder, manifest)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path / "home", tracking_uri="sqlite:///unused")


@pytest.fixture
def signed(tmp_path: Path, settings: Settings) -> Path:
    model = make_model(tmp_path / "model")
    seal_by_hand(settings, model.path)
    return model.path


def trust(settings: Settings, **given: Any) -> ServeConfig:
    return ServeConfig(trusted_keys_file=public_file(settings.signing_key_file), **given)


def test_key_is_made_once_readable_by_its_owner_alone(settings: Settings) -> None:
    first = signing_key(settings.signing_key_file, may_make=True)
    second = signing_key(settings.signing_key_file, may_make=True)
    assert first.private_bytes_raw() == second.private_bytes_raw()
    assert stat.S_IMODE(settings.signing_key_file.stat().st_mode) == 0o600
    assert len(trusted_keys(public_file(settings.signing_key_file))) == 1
    assert "PRIVATE" not in public_file(settings.signing_key_file).read_text()


def test_key_that_others_may_read_is_refused(settings: Settings) -> None:
    signing_key(settings.signing_key_file, may_make=True)
    settings.signing_key_file.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        signing_key(settings.signing_key_file, may_make=True)


def test_key_that_another_user_lends_to_our_group_is_taken_but_not_one_that_all_may_read(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Kubernetes mounts a Secret: root's file, readable by the pod's group. One of our own we can close, and must."""
    path = settings.signing_key_file
    signing_key(path, may_make=True)
    path.chmod(0o440)
    with pytest.raises(ConfigError, match="chmod 600"):
        signing_key(path, may_make=False)
    monkeypatch.setattr("os.getuid", lambda: path.stat().st_uid + 1)
    assert signing_key(path, may_make=False)
    path.chmod(0o444)
    with pytest.raises(ConfigError, match="chmod 600"):
        signing_key(path, may_make=False)


@pytest.mark.parametrize("content", ["not a key", "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"])
def test_key_file_with_something_else_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "key.pem"
    path.write_text(content)
    path.chmod(0o600)
    with pytest.raises(ConfigError, match="ed25519"):
        signing_key(path, may_make=False)


def test_key_that_a_variable_names_is_never_made(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="SLIPWAY_SIGNING_KEY"):
        signing_key(tmp_path / "absent.pem", may_make=False)
    assert list(tmp_path.iterdir()) == []


def test_signed_model_is_served_and_its_digest_is_what_it_was(signed: Path, settings: Settings) -> None:
    before = read_manifest(signed).digest
    require_trusted(signed, "toy", trust(settings))
    assert verify(signed, ("quantized",)).digest == before


def test_unsigned_model_is_refused_unless_allowed_by_name(tmp_path: Path, settings: Settings) -> None:
    model = make_model(tmp_path / "model").path
    for config in (trust(settings), trust(settings, allow_unsigned=("other",))):
        with pytest.raises(ArtifactError, match=r"serve.allow_unsigned=\[toy\]"):
            require_trusted(model, "toy", config)
    require_trusted(model, "toy", trust(settings, allow_unsigned=("toy",)))


def test_unsigned_adapter_beside_a_signed_model_is_refused(signed: Path, tmp_path: Path, settings: Settings) -> None:
    adapter = make_model(tmp_path / "adapter").path
    with pytest.raises(ArtifactError, match=r"'lamp' is not in serve\.allow_unsigned"):
        require_all_trusted(signed, "toy", trust(settings, adapters={"lamp": adapter}))


def test_model_signed_by_a_stranger_is_unsigned_here(signed: Path, tmp_path: Path) -> None:
    other = Settings(home=tmp_path / "other", tracking_uri="sqlite:///unused")
    signing_key(other.signing_key_file, may_make=True)
    with pytest.raises(ArtifactError, match="signed by"):
        require_trusted(signed, "toy", trust(other))


def test_several_trusted_keys_lie_in_one_file(signed: Path, settings: Settings, tmp_path: Path) -> None:
    other = Settings(home=tmp_path / "other", tracking_uri="sqlite:///unused")
    signing_key(other.signing_key_file, may_make=True)
    both = tmp_path / "keys.pem"
    both.write_text("".join(public_file(each.signing_key_file).read_text() for each in (other, settings)))
    require_trusted(signed, "toy", ServeConfig(trusted_keys_file=both))


def edit_manifest(folder: Path) -> None:
    told = json.loads((folder / "manifest.json").read_text())
    told["model"]["stop_ids"] = [7]
    (folder / "manifest.json").write_text(json.dumps(told))


def edit_payload(folder: Path) -> None:
    path = folder / "seal" / "signature.json"
    told = json.loads(path.read_text())
    statement = json.loads(base64.b64decode(told["payload"]))
    statement["predicate"]["gates"] = "passed"
    told["payload"] = base64.b64encode(json.dumps(statement).encode()).decode()
    path.write_text(json.dumps(told))


def edit_envelope(folder: Path) -> None:
    (folder / "seal" / "signature.json").write_text("{}")


@pytest.mark.parametrize("alter", [edit_manifest, edit_payload, edit_envelope])
def test_altered_model_is_refused_even_where_unsigned_ones_are_allowed(signed: Path, settings: Settings, alter: Any) -> None:
    alter(signed)
    with pytest.raises(ArtifactError, match=r"altered|envelope"):
        require_trusted(signed, "toy", trust(settings, allow_unsigned=("toy",)))


def test_signature_moved_to_another_model_is_refused(signed: Path, tmp_path: Path, settings: Settings) -> None:
    other = make_model(tmp_path / "other", "other weights").path
    (other / "seal").mkdir()
    (other / "seal" / "signature.json").write_bytes((signed / "seal" / "signature.json").read_bytes())
    with pytest.raises(ArtifactError, match="altered after it was signed"):
        require_trusted(other, "toy", trust(settings))


def test_altered_weights_are_not_signed(tmp_path: Path, settings: Settings) -> None:
    model = make_model(tmp_path / "model").path
    (model / "model.bin").write_text("WEIGHTS")
    with pytest.raises(ArtifactError, match="sha256"):
        seal_by_hand(settings, model)
    assert not (model / "seal").exists()


def test_promoted_model_is_signed_with_its_certificate_and_bill(tmp_path: Path, settings: Settings) -> None:
    base = make_model(tmp_path / "base", "base")
    model = make_model(tmp_path / "model", parents={"merged": base.manifest.digest})
    certificate = make_certificate(tmp_path / "certificate")
    seal_promoted(settings, "toy", model, certificate, {"merge": base, "quantize": model}, {"gates": "passed"})
    keys = trusted_keys(public_file(settings.signing_key_file))
    told = check_seal(model.path, keys)
    assert told.predicate["gates"] == "passed"
    assert told.predicate["certificate_digest"] == certificate.manifest.digest
    assert set(told.documents) == {"certificate.json", SBOM_NAME}
    assert check_seal(certificate.path, keys).predicate["artifact_digest"] == certificate.manifest.digest
    (model.path / "seal" / "certificate.json").write_text('{"passed": true}')
    with pytest.raises(ArtifactError, match=r"certificate\.json: altered"):
        check_seal(model.path, keys)


def make_certificate(folder: Path) -> Artifact:
    folder.mkdir()
    (folder / "certificate.json").write_text('{"passed": false}')
    return Artifact(folder, write_manifest(folder, "certificate", Provenance()))


def test_bill_names_all_that_the_model_is_made_of_and_nothing_else(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", "base")
    model = make_model(tmp_path / "model", parents={"merged": base.manifest.digest})
    stranger = make_model(tmp_path / "stranger", "stranger")
    found = bill("toy", "1", model, {"merge": base, "quantize": model, "other": stranger})
    assert (found["bomFormat"], found["specVersion"]) == ("CycloneDX", "1.6")
    digests = {each["hashes"][0]["content"] for each in found["components"] if "hashes" in each}
    assert digests == {base.manifest.digest, model.manifest.files["model.bin"].sha256}
    assert {each.get("purl") for each in found["components"]} == {None, "pkg:pypi/openvino@1"}
    references = [each["bom-ref"] for each in (*found["components"], found["metadata"]["component"])]
    assert len(references) == len(set(references))
    own = next(each for each in found["dependencies"] if each["ref"] == found["metadata"]["component"]["bom-ref"])
    assert own["dependsOn"] == [f"quantized/{base.manifest.digest[:16]}"]
    assert bill("toy", "1", model, {"merge": base, "quantize": model}) == found


def test_signature_is_dsse_as_its_specification_says(tmp_path: Path) -> None:
    """Against the pre-authentication encoding written out by hand, not by the code under test."""
    model = make_model(tmp_path / "model").path
    key = Ed25519PrivateKey.generate()
    seal(model, key, {}, {})
    envelope = json.loads((model / "seal" / "signature.json").read_text())
    payload = base64.b64decode(envelope["payload"])
    text = b"DSSEv1 28 application/vnd.in-toto+json " + str(len(payload)).encode() + b" " + payload
    key.public_key().verify(base64.b64decode(envelope["signatures"][0]["sig"]), text)
    assert json.loads(payload)["subject"][0]["name"] == "manifest.json"
    with pytest.raises(UnsignedError):
        check_seal(model, {"another": key.public_key()})


def test_private_key_is_in_no_settings_text(settings: Settings, tmp_path: Path) -> None:
    key = signing_key(settings.signing_key_file, may_make=True)
    secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode().splitlines()[1]
    model = make_model(tmp_path / "model").path
    seal_by_hand(settings, model)
    written = "".join(path.read_text() for path in (model / "seal").iterdir())
    assert secret not in repr(settings) + written


def test_manifest_does_not_name_what_lies_in_the_seal(signed: Path) -> None:
    found = write_manifest(signed, "quantized", Provenance(), FACTS)
    assert set(found.files) == {"model.bin"}
    assert isinstance(found, Manifest)
    assert isinstance(found.files["model.bin"], FileEntry)
