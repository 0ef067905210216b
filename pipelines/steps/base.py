"""base: the base model as a checked folder of safetensors."""

from __future__ import annotations

from collections.abc import Mapping

from infra import models
from infra.config import Config
from infra.files import sha256_json
from pipelines import serveable
from pipelines.spec import Spec
from pipelines.step import Artifact, Step, StepContext
from training.config import BaseJob


class BaseConfig(Config):
    """Identity of a base model."""

    source: str


def step(spec: Spec) -> Step:
    """The step for the spec's base model. Raises ConfigError when a local source cannot be found."""
    digests = {} if models.is_remote(spec.base_model) else {"weights": _stamp(spec.base_model)}

    def check(made: Artifact, inputs: Mapping[str, Artifact]) -> None:
        serveable.check_base(spec, made.path)

    return Step("base", 1, "base", BaseConfig(source=spec.base_model), run, source_digests=digests, check=check)


def run(config: BaseConfig, context: StepContext) -> None:
    """Converts or copies the base model."""
    context.run_program("training.base", context.job(BaseJob, source=config.source))


def _stamp(source: str) -> str:
    """Names, sizes and times of a local model's files: telling a changed model apart must not read gigabytes."""
    found = models.locate(source)
    files = [found] if found.is_file() else sorted(path for path in found.iterdir() if path.is_file())
    return sha256_json([[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files])
