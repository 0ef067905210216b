"""Custom kinds, read from their CustomResourceDefinitions, and what an API server says of an object of such a kind.

The definitions of KubeRay are not part of this repository. `SLIPWAY_KUBERAY_CRDS` names a folder of them (`*.yaml` or `*.yaml.gz`);
without it, `../shared/kuberay-crds` beside the checkout is used where it exists.
"""

from __future__ import annotations

import copy
import functools
import gzip
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.charts import structural

CRDS_VARIABLE = "SLIPWAY_KUBERAY_CRDS"
BESIDE_CHECKOUT = Path(__file__).parents[3] / "shared" / "kuberay-crds"

# The parts of an object that its kind's schema does not describe.
ENVELOPE = frozenset({"apiVersion", "kind", "metadata"})


@dataclass(frozen=True)
class CustomKind:
    """One served version of a custom kind."""

    api_version: str
    kind: str
    plural: str
    is_namespaced: bool
    has_status: bool
    """Whether status is a subresource: writes of the object then keep the stored status, and writes of the status change nothing else."""
    schema: structural.Schema


@dataclass(frozen=True)
class Admission:
    """What became of an object: as it would be stored, the fields that the schema does not name, and what is wrong."""

    stored: dict[str, Any]
    unknown: list[str]
    """Paths that strict validation refuses; they are absent from `stored`."""
    problems: list[str]
    """One line each with its path; empty means that the object is valid."""


def must_be_here() -> bool:
    """Whether it is an error that the definitions are absent: on the CI services that fetch them (`.github/workflows/ci.yml`)."""
    return bool(os.environ.get("GITHUB_ACTIONS") or os.environ.get("GITLAB_CI"))


def crds_folder() -> Path | None:
    """The folder of KubeRay's definitions, or None where there is none here."""
    named = os.environ.get(CRDS_VARIABLE)
    if named:
        return Path(named)
    return BESIDE_CHECKOUT if BESIDE_CHECKOUT.is_dir() else None


@functools.cache
def read_crds(folder: Path) -> tuple[dict[str, Any], ...]:
    """The CustomResourceDefinition documents below `folder`; raises FileNotFoundError when it holds none."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    files = sorted([*folder.glob("*.yaml"), *folder.glob("*.yaml.gz")])
    found = [document for file in files for document in yaml.load_all(_text(file), loader) if document]
    definitions = tuple(document for document in found if document.get("kind") == "CustomResourceDefinition")
    if not definitions:
        raise FileNotFoundError(f"{folder}: no CustomResourceDefinition in *.yaml or *.yaml.gz; set {CRDS_VARIABLE} to their folder.")
    return definitions


def custom_kinds(definitions: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str], CustomKind]:
    """Every served version of the defined kinds, by (apiVersion, kind)."""
    kinds: dict[tuple[str, str], CustomKind] = {}
    for definition in definitions:
        spec = definition["spec"]
        for version in spec["versions"]:
            if not version["served"]:
                continue
            api_version = f"{spec['group']}/{version['name']}"
            kinds[api_version, spec["names"]["kind"]] = CustomKind(
                api_version=api_version,
                kind=spec["names"]["kind"],
                plural=spec["names"]["plural"],
                is_namespaced=spec["scope"] == "Namespaced",
                has_status="status" in version.get("subresources", {}),
                schema=version["schema"]["openAPIV3Schema"],
            )
    return kinds


def admit(document: Mapping[str, Any], kind: CustomKind, old: Mapping[str, Any] | None = None) -> Admission:
    """What an API server makes of `document` on create, or on the update of `old`; neither is changed.

    Metadata is left as it is: its rules are those of every object, not of the kind.
    """
    # By way of JSON: a part that YAML's anchors share must become two.
    body, schema = json.loads(json.dumps(_body(document))), _body_schema(kind.schema)
    unknown = structural.unknown_fields(body, schema)
    structural.prune(body, schema)
    structural.drop_nulls(body, schema)
    structural.set_defaults(body, schema)
    found = structural.problems(body, schema, old=_body(old) if old else None)
    envelope = {key: copy.deepcopy(value) for key, value in document.items() if key in ENVELOPE}
    return Admission(stored=envelope | body, unknown=unknown, problems=found)


def _body(document: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in document.items() if key not in ENVELOPE}


def _body_schema(schema: structural.Schema) -> structural.Schema:
    required = [name for name in schema.get("required", ()) if name not in ENVELOPE]
    return {**schema, "properties": _body(schema.get("properties", {})), "required": required}


def _text(file: Path) -> str:
    return gzip.decompress(file.read_bytes()).decode() if file.suffix == ".gz" else file.read_text(encoding="utf-8")
