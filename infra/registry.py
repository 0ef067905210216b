"""Model versions in the MLflow registry, and what is written on them.

- A version points at one artifact and carries its content digest, so the same artifact is never registered twice.
- With a store of this machine it points at the artifact's folder; with one that other machines share, at the files in the run (uploads.py).
- Its tags say which gates it passed, what proves it and what it was made from; infra/aliases.py moves the aliases.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlparse

from infra import aliases, lease
from infra.aliases import CHALLENGER, CHAMPION, PREVIOUS
from infra.errors import RegistryError, TransientError

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.tracking import MlflowClient

__all__ = ["CHALLENGER", "CHAMPION", "PREVIOUS", "RegisteredVersion"]

DIGEST_TAG = "slipway.digest"
PLACE_TAG = "slipway.place"
IN_RUN = "run"
GATES_TAG = "slipway.gates"
GATE_PREFIX = "slipway.gate."
PASSED, REFUSED = "passed", "refused"
MAX_KEY_CHARS = 250
MAX_VALUE_CHARS = 5000  # what every MLflow server of the last years takes
MAX_DESCRIPTION_CHARS = 5000
NOT_IN_A_KEY = re.compile(r"[^\w.\- /:]|(?<=/)/")


@dataclass(frozen=True)
class RegisteredVersion:
    """One version of a registered model."""

    name: str
    version: str
    source: str
    digest: str
    aliases: tuple[str, ...]
    run_id: str
    tags: Mapping[str, str]

    @property
    def is_local(self) -> bool:
        """Whether the version points at a folder of the machine that registered it, and not at files in its run."""
        return self.tags.get(PLACE_TAG) != IN_RUN

    @property
    def folder(self) -> Path:
        """The folder of a local version."""
        return Path(unquote(urlparse(self.source).path))


def register(
    mlflow: MlflowClient, name: str, folder: Path, digest: str, run_id: str, publish: Callable[[], str] | None = None
) -> RegisteredVersion:
    """The version of `name` that holds this artifact, made when there is none.

    `publish` puts the artifact into the run, for other machines, and gives its address there; absent, the version points at `folder`.
    """
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import RESOURCE_ALREADY_EXISTS, ErrorCode

    try:
        mlflow.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != ErrorCode.Name(RESOURCE_ALREADY_EXISTS):
            raise
    for version in mlflow.search_model_versions(f"name = '{name}' and tags.`{DIGEST_TAG}` = '{digest}'"):
        found = _registered(version, {})
        is_the_same = not found.is_local if publish else found.folder == folder.absolute()
        if is_the_same:
            return lookup(mlflow, name, found.version)
    source = publish() if publish else folder.absolute().as_uri()
    tags = {DIGEST_TAG: digest} | ({PLACE_TAG: IN_RUN} if publish else {})
    created = mlflow.create_model_version(name, source=source, run_id=run_id, tags=tags)
    return lookup(mlflow, name, str(created.version))


def lookup(mlflow: MlflowClient, name: str, version: str) -> RegisteredVersion:
    """A version by number. Raises RegistryError when there is none."""
    from mlflow.exceptions import MlflowException

    try:
        return _registered(mlflow.get_model_version(name, version), aliases.read(mlflow, name))
    except MlflowException as error:
        raise RegistryError(f"{name} version {version}: not in the registry ({error.message}). `slipway status` lists what is.") from error


def resolve(mlflow: MlflowClient, name: str, alias: str = CHAMPION) -> RegisteredVersion:
    """The version an alias points at. Raises RegistryError when the name or the alias is not there."""
    found = aliases.read(mlflow, name)
    if alias not in found:
        listed = ", ".join(f"@{each}" for each in sorted(found)) or "no alias"
        raise RegistryError(f"{name}@{alias}: not in the registry, which has {listed} of it. `slipway status {name}` lists its versions.")
    return lookup(mlflow, name, found[alias])


def mark_challenger(mlflow: MlflowClient, version: RegisteredVersion, gates: list[dict[str, Any]]) -> None:
    """Points `challenger` at the version and writes the outcome of every gate on it, in place of what an earlier run wrote."""
    tags = {gate_key(gate["name"]): f"{PASSED if gate['passed'] else REFUSED}: {gate['detail']}" for gate in gates}
    for key in version.tags:
        if key.startswith(GATE_PREFIX) and key not in tags:
            mlflow.delete_model_version_tag(version.name, version.version, key)
    tags[GATES_TAG] = PASSED if all(gate["passed"] for gate in gates) else REFUSED
    write_tags(mlflow, version, tags)
    mlflow.set_registered_model_alias(version.name, CHALLENGER, version.version)


def gate_key(name: str) -> str:
    """The tag of a gate; characters that a tag's name cannot have are replaced."""
    return (GATE_PREFIX + NOT_IN_A_KEY.sub("_", name))[:MAX_KEY_CHARS]


def write_tags(mlflow: MlflowClient, version: RegisteredVersion, tags: Mapping[str, str]) -> None:
    """Sets tags of a version, each shortened to what a tag can hold."""
    for key, value in tags.items():
        mlflow.set_model_version_tag(version.name, version.version, key, value[:MAX_VALUE_CHARS])


def refused_gates(version: RegisteredVersion) -> list[str]:
    """What the gates that refused it said, one line each."""
    refused = f"{REFUSED}: "
    return [
        f"{key.removeprefix(GATE_PREFIX)}: {value.removeprefix(refused)}"
        for key, value in sorted(version.tags.items())
        if key.startswith(GATE_PREFIX) and value.startswith(refused)
    ]


def promote(
    mlflow: MlflowClient, version: RegisteredVersion, note: Mapping[str, str] | None = None, expected: str | None = None
) -> RegisteredVersion:
    """Moves `champion` to the version, keeping the old one as `previous`; does nothing when it is champion already.

    All of it happens or nothing does. `note` becomes tags of the version. `expected` is the version that was champion when this was
    decided ("" for none): where another is by now, TransientError says so, as it does where someone else is moving the aliases.
    """
    with lease.held(mlflow, version.name) as still_mine:
        aliases.settle(mlflow, version.name)
        champion = aliases.read(mlflow, version.name).get(CHAMPION, "")
        if expected is not None and champion not in (expected, version.version):
            raise TransientError(
                f"{version.name}: version {champion} became @{CHAMPION} meanwhile, and version {expected or 'none'} was when this was "
                f"decided. Nothing moved. Look at `slipway status {version.name}`, then run it again."
            )
        aliases.move(mlflow, version.name, version.version, note or {}, still_mine)
    return lookup(mlflow, version.name, version.version)


def all_versions(mlflow: MlflowClient, name: str | None = None) -> list[RegisteredVersion]:
    """Every version of one model or of all, newest first."""
    found = []
    for model in [name] if name else _model_names(mlflow):
        versions = list(mlflow.search_model_versions(f"name = '{model}'"))
        pointed = aliases.read(mlflow, model) if versions else {}
        found += [_registered(version, pointed) for version in versions]
    return sorted(found, key=lambda item: (item.name, -int(item.version)))


def _model_names(mlflow: MlflowClient) -> list[str]:
    names, page = [], None
    while True:
        models = mlflow.search_registered_models(page_token=page)
        names += [model.name for model in models]
        if not (page := models.token):
            return names


def _registered(version: ModelVersion, pointed: Mapping[str, str]) -> RegisteredVersion:
    number = str(version.version)  # a number from some stores, a text from others
    return RegisteredVersion(
        name=version.name,
        version=number,
        source=version.source,
        digest=version.tags.get(DIGEST_TAG, ""),
        aliases=tuple(sorted(alias for alias, pointed_at in pointed.items() if pointed_at == number)),
        run_id=version.run_id or "",
        tags=dict(version.tags),
    )
