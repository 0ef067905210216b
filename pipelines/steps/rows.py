"""rows: the dataset as checked train.jsonl and heldout.jsonl."""

from __future__ import annotations

import importlib
from functools import partial
from pathlib import Path

from infra.config import Config
from infra.contracts import write_manifest
from infra.errors import ConfigError
from infra.files import sha256_file, sha256_json
from pipelines.datasets.options import SmartHomeOptions
from pipelines.spec import FilesDataset, SmartHomeDataset, Spec
from pipelines.step import Step, StepContext
from training.config import RowsJob

SMART_HOME_MODULE = "pipelines.datasets.smart_home"


class SourceConfig(Config):
    """Identity of one source: its files enter by digest, not by path."""

    role: str
    weight: float | None
    format: str
    split: str


class FilesConfig(Config):
    """Identity of a dataset of files."""

    sources: tuple[SourceConfig, ...]
    heldout_share: float
    seed: int
    format: str


def step(spec: Spec) -> Step:
    """The step for the spec's dataset. Raises one ConfigError with every source that is missing."""
    dataset = spec.dataset
    if isinstance(dataset, SmartHomeDataset):
        options = SmartHomeOptions(**dataset.model_dump(exclude={"type"}))
        return Step("rows", 1, "dataset", options, _build_smart_home)
    named = [(f"{role}[{number}]", source) for role in ("train", "heldout") for number, source in enumerate(getattr(dataset, role) or ())]
    missing = [f"dataset.{role}: {each.path}" for role, each in named if not each.path.startswith("hf:") and not Path(each.path).exists()]
    if missing:
        raise ConfigError(f"{'; '.join(missing)} does not exist. A file or folder of rows is needed.")
    config = FilesConfig(
        sources=tuple(SourceConfig(role=role, weight=each.weight, format=each.format, split=each.split) for role, each in named),
        heldout_share=dataset.heldout_share,
        seed=dataset.seed,
        format=spec.data.format,
    )
    digests = {role: _digest(source.path) for role, source in named}
    return Step("rows", 3, "dataset", config, partial(_read_files, dataset, spec), source_digests=digests)


def _digest(path: str) -> str:
    """Of a file its content, of a folder its files' contents, of the hub's dataset its name: pin a revision there."""
    if path.startswith("hf:"):
        return path
    place = Path(path)
    if place.is_file():
        return sha256_file(place)
    return sha256_json({str(each.relative_to(place)): sha256_file(each) for each in sorted(place.rglob("*")) if each.is_file()})


def _build_smart_home(options: SmartHomeOptions, context: StepContext) -> None:
    build = importlib.import_module(SMART_HOME_MODULE).build  # hassil is needed only when the rows are built
    build(options, context.output_dir)
    write_manifest(context.output_dir, "dataset", context.provenance)


def _read_files(dataset: FilesDataset, spec: Spec, config: FilesConfig, context: StepContext) -> None:
    job = context.job(
        RowsJob,
        train=dataset.train,
        heldout=dataset.heldout,
        heldout_share=config.heldout_share,
        seed=config.seed,
        data=spec.data,
    )
    context.run_program("training.data.rows", job)
