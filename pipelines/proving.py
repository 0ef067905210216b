"""`slipway prove` and `slipway sign`: a certificate made, read and put into words."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.text import Text

from infra import registry, tracking
from infra.contracts import SEAL_DIR
from infra.errors import ArtifactError, ConfigError
from infra.files import read_json
from infra.provenance import capture
from infra.settings import Settings
from infra.signing import SIGNATURE_NAME, check_seal, public_file, trusted_keys
from pipelines import graph, preflight, runner
from pipelines.display import Display
from pipelines.pipeline import make_run_dir, tracked_run
from pipelines.plan import build_steps
from pipelines.proof.certificate import CERTIFICATE_NAME
from pipelines.proof.checks import MEANINGS, Check
from pipelines.spec import Spec, load_spec
from pipelines.target import SPEC_SUFFIXES

STEP = "prove"


def prove(spec: Spec, settings: Settings, display: Display) -> dict[str, Any]:
    """The certificate of a spec, made with all that it needs where that is not there."""
    steps = graph.upto(build_steps(spec), STEP)
    preflight.check(spec, runner.plan(settings, steps), settings, will_serve=False)
    run_dir = make_run_dir(spec, settings)
    with tracked_run(spec, settings, run_dir) as tracked:
        outcome = runner.run(settings, steps, run_dir, capture(spec.fingerprint, tracked.run_id), tracked, display)
        path = outcome.artifacts[STEP].path / CERTIFICATE_NAME
        tracked.client.log_artifact(tracked.run_id, str(path))
    return {**read_json(path), "path": str(path), "seconds": outcome.timings_s[STEP]}


def find_certificate(named: str, overrides: list[str], settings: Settings) -> tuple[dict[str, Any], str]:
    """The certificate that a spec file, NAME@ALIAS or folder has already, and what is known of its signature; makes nothing.

    Raises ConfigError, RegistryError or ArtifactError where there is none.
    """
    path = Path(named)
    if path.suffix in SPEC_SUFFIXES:
        folder = _made(load_spec(path, overrides), settings)
    elif path.is_dir():
        folder = path
    else:
        return _registered(named, settings)
    found = next((place for place in (folder / CERTIFICATE_NAME, folder / SEAL_DIR / CERTIFICATE_NAME) if place.is_file()), None)
    if found is None:
        raise ArtifactError(
            f"{folder}: holds no {CERTIFICATE_NAME}. A promoted model's folder has one, and `slipway prove SPEC` makes one."
        )
    return dict(read_json(found)), signature_text(folder, settings)


def _made(spec: Spec, settings: Settings) -> Path:
    planned = runner.plan(settings, graph.upto(build_steps(spec), STEP))
    if planned[-1].artifact is None:
        raise ConfigError(f"{spec.name}: no certificate yet ({planned[-1].reason}). `slipway prove SPEC` makes it.")
    return planned[-1].artifact.path


def _registered(named: str, settings: Settings) -> tuple[dict[str, Any], str]:
    """Of a promoted version it lies in its folder, of any other in the run that made it."""
    name, _, alias = named.partition("@")
    client = tracking.client(settings.tracking_uri)
    version = registry.resolve(client, name, alias or registry.CHAMPION)
    place = version.folder / SEAL_DIR / CERTIFICATE_NAME
    if place.is_file():
        return dict(read_json(place)), signature_text(version.folder, settings)
    with tempfile.TemporaryDirectory() as scratch:
        if CERTIFICATE_NAME not in {item.path for item in client.list_artifacts(version.run_id)}:
            raise ArtifactError(f"{named}: version {version.version} has no certificate. `slipway prove SPEC` makes one.")
        found = Path(client.download_artifacts(version.run_id, CERTIFICATE_NAME, scratch))
        return dict(read_json(found)), "not signed: it was not promoted"


def signature_text(folder: Path, settings: Settings) -> str:
    """Who signed a folder, and whether that counts here."""
    if not (folder / SEAL_DIR / SIGNATURE_NAME).is_file():
        return "not signed"
    try:
        seal = check_seal(folder, trusted_keys(public_file(settings.signing_key_file)))
    except (ArtifactError, ConfigError) as error:
        return f"not good: {error.message}"
    return f"good, by this machine's key {seal.key_id[:16]} at {seal.predicate.get('signed_at')}"


def explain(certificate: Mapping[str, Any], signature: str) -> Text:
    """A certificate in words: every check, what was compared, what came out, and what a failure would mean."""
    checks = [Check.model_validate(each) for each in certificate.get("checks", ())]
    bad = [check for check in checks if not check.passed]
    chats = certificate.get("chats", {})
    verdict = "passed" if checks and not bad else "REFUSED" if checks else "made before stages were compared"
    text = Text.assemble(("certificate ", "bold"), (verdict, "bold green" if verdict == "passed" else "bold red"))
    text.append(f": {len(checks) - len(bad)} of {len(checks)} checks passed, over {chats.get('heldout', 0)} held-out rows and ")
    text.append(f"{chats.get('adversarial', 0)} other chats; the reference is {certificate['reference']}\nsignature {signature}\n")
    for name in dict.fromkeys(check.name for check in checks):
        text.append(f"\n{name}", "bold")
        text.append(f"  (a failure would mean: {MEANINGS.get(name, 'unknown')})\n", "dim")
        for check in (each for each in checks if each.name == name):
            text.append("  pass  " if check.passed else "  FAIL  ", "green" if check.passed else "bold red")
            text.append(f"{check.stage}: {check.compared}: {check.found}\n")
            if check.cause:
                text.append(f"        {check.cause}\n", "red")
    for name, compared in certificate["models"].items():
        same = compared["same_answer"]
        text.append(f"\n{name} answers {same['value']:.1%} of all {same['n']} held-out rows exactly as {certificate['reference']}")
        text.append(f" ({same['low']:.1%} to {same['high']:.1%})")
    return text
