"""`slipway promote` and `slipway rollback`: who may become champion, and on whose word."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from infra import lease, registry
from infra.errors import ConfigError, GateFailed, RegistryError
from infra.registry import CHALLENGER, CHAMPION, PREVIOUS, RegisteredVersion
from pipelines.registration import CERTIFICATE_TAG, HOLDS

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

PROMOTED_PREFIX = "slipway.promoted."
FORCED_PREFIX = "slipway.forced."
ROLLED_BACK_PREFIX = "slipway.rolled_back."
MAX_REASON_CHARS = 1000


def promote(mlflow: MlflowClient, name: str, number: str | None, forced_because: str | None = None) -> RegisteredVersion:
    """Makes a version champion, the challenger where none is named.

    Raises GateFailed, with every objection, when its gates or its certificate do not allow it and nobody forces it with a reason;
    RegistryError when there is no such version; TransientError when someone else moved the aliases.
    """
    champion = _champion(mlflow, name)  # first: what is decided below is decided against it
    version = candidate(mlflow, name, number)
    note = _note(PROMOTED_PREFIX)
    if forced_because is not None:
        note |= _note(FORCED_PREFIX, checked_reason(forced_because))
    elif found := objections(version):
        raise GateFailed(
            f"{name} version {version.version} is not promoted:\n  " + "\n  ".join(found) + "\nMend it and run its spec again, or take "
            f"responsibility: slipway promote {name} {version.version} --force --reason 'why'."
        )
    return registry.promote(mlflow, version, note, expected=champion)


def candidate(mlflow: MlflowClient, name: str, number: str | None) -> RegisteredVersion:
    """The version that was named, or else the challenger. Raises RegistryError when there is no such version."""
    return registry.lookup(mlflow, name, number) if number else registry.resolve(mlflow, name, CHALLENGER)


def rollback(mlflow: MlflowClient, name: str) -> RegisteredVersion:
    """Makes `previous` champion again, and what was champion `previous`. Raises RegistryError when there is no way back."""
    champion = _champion(mlflow, name)
    version = registry.resolve(mlflow, name, PREVIOUS)
    return registry.promote(mlflow, version, _note(ROLLED_BACK_PREFIX), expected=champion)


def objections(version: RegisteredVersion) -> list[str]:
    """What keeps a version from being promoted, one line each, as its tags tell."""
    gates = version.tags.get(registry.GATES_TAG)
    found = registry.refused_gates(version)
    if gates is None:
        found.append("its gates were never evaluated")
    elif gates != registry.PASSED and not found:
        found.append(f"its gates: {gates}")
    certificate = version.tags.get(CERTIFICATE_TAG)
    if certificate != HOLDS and not any(line.startswith("certificate") for line in found):  # a gate may have said it already, and why
        found.append(f"its certificate: {certificate or 'there is none'}")
    return found


def checked_reason(reason: str) -> str:
    """The reason for a forced promotion. Raises ConfigError when it says nothing, or more than a tag can hold."""
    if not reason.strip():
        raise ConfigError("--force without --reason: say why, in a sentence; it is kept with the version.")
    if len(reason) > MAX_REASON_CHARS:
        raise ConfigError(f"--reason: {len(reason)} characters, at most {MAX_REASON_CHARS} can be kept. Say it shorter.")
    return reason.strip()


def _champion(mlflow: MlflowClient, name: str) -> str:
    """The version that is champion now, "" for none."""
    try:
        return registry.resolve(mlflow, name, CHAMPION).version
    except RegistryError:
        return ""


def _note(prefix: str, reason: str | None = None) -> dict[str, str]:
    note = {f"{prefix}by": lease.who_am_i(), f"{prefix}at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    return note if reason is None else note | {f"{prefix}reason": reason}
