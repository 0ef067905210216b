"""A step: a plain function with a typed config, typed inputs and one artifact as output.

- Identity is `name@version`, config and the digests of its inputs. Where it runs and where it writes are not part of it.
- A step writes only below `context.output_dir`, its manifest last, and may be run again over what a killed attempt left there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from infra.config import Config
from infra.contracts import Kind, Manifest
from infra.files import sha256_json
from infra.process import Job, TrackingTarget
from infra.provenance import Provenance

ProgramRunner = Callable[[str, Job], None]


@dataclass(frozen=True)
class Artifact:
    """A complete output of a step."""

    path: Path
    manifest: Manifest


@dataclass(frozen=True)
class StepContext:
    """What a running step is given."""

    output_dir: Path
    inputs: Mapping[str, Artifact]
    provenance: Provenance
    tracking: TrackingTarget | None
    progress_file: Path
    run_program: ProgramRunner
    """Starts `python -m MODULE --config F` for a job and returns when it has ended well."""

    def job(self, model: type[Job], **fields: Any) -> Any:
        """A job of this step: its output, progress, tracking and provenance filled in."""
        return model(
            output_dir=self.output_dir, progress_file=self.progress_file, tracking=self.tracking, provenance=self.provenance, **fields
        )

    def input_of_kind(self, kind: Kind) -> Artifact:
        """The one input of that kind, whichever step made it."""
        (found,) = (artifact for artifact in self.inputs.values() if artifact.manifest.kind == kind)
        return found


@dataclass(frozen=True)
class Step:
    """One node of the graph."""

    name: str
    version: int
    produces: Kind
    config: Config
    run: Callable[[Any, StepContext], None]
    needs: Mapping[str, Kind] = field(default_factory=dict)
    """Steps whose artifacts are read, with the kind each must produce."""
    source_digests: Mapping[str, str] = field(default_factory=dict)
    """Digests of inputs from outside the graph, such as a dataset file."""
    check: Callable[[Artifact, Mapping[str, Artifact]], None] | None = None
    """Looks at the artifact and its inputs, made now or before, for what a later step could not use; raises ConfigError."""

    @property
    def label(self) -> str:
        """`name@version`."""
        return f"{self.name}@{self.version}"

    def identity(self, input_digests: Mapping[str, str]) -> str:
        """Hex digest of all that decides the output."""
        inputs = {name: input_digests[name] for name in self.needs}
        return sha256_json(
            {"step": self.label, "config": identity_fields(self.config), "inputs": inputs, "sources": dict(self.source_digests)}
        )


def identity_fields(config: BaseModel) -> dict[str, Any]:
    """The fields of a config that decide what is made; those marked `identity: False` only say how or where."""
    fields: dict[str, Any] = {}
    for name, info in type(config).model_fields.items():
        extra = info.json_schema_extra
        if isinstance(extra, dict) and extra.get("identity") is False:
            continue
        value = getattr(config, name)
        fields[name] = identity_fields(value) if isinstance(value, BaseModel) else config.model_dump(mode="json", include={name})[name]
    return fields
