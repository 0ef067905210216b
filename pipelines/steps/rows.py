"""rows: the dataset as checked train.jsonl and heldout.jsonl."""

from __future__ import annotations

import importlib
from functools import partial

from infra.config import Config
from infra.contracts import write_manifest
from infra.errors import ConfigError
from infra.files import sha256_file
from pipelines.datasets.options import SmartHomeOptions
from pipelines.spec import FilesDataset, SmartHomeDataset, Spec
from pipelines.step import Step, StepContext
from training.config import RowsJob

SMART_HOME_MODULE = "pipelines.datasets.smart_home"


class FilesConfig(Config):
    """Identity of a dataset of files: the files themselves enter by digest, not by path."""

    heldout_share: float
    seed: int
    format: str


def step(spec: Spec) -> Step:
    """The step for the spec's dataset. Raises ConfigError when one of its files is missing."""
    dataset = spec.dataset
    if isinstance(dataset, SmartHomeDataset):
        options = SmartHomeOptions(**dataset.model_dump(exclude={"type"}))
        return Step("rows", 1, "dataset", options, _build_smart_home)
    digests = {}
    for role, path in (("train", dataset.train), ("heldout", dataset.heldout)):
        if path is None:
            continue
        if not path.is_file():
            raise ConfigError(f"dataset.{role}: {path} does not exist. A JSONL file is needed, one object a line.")
        digests[role] = sha256_file(path)
    config = FilesConfig(heldout_share=dataset.heldout_share, seed=dataset.seed, format=spec.data.format)
    return Step("rows", 1, "dataset", config, partial(_read_files, dataset, spec), source_digests=digests)


def _build_smart_home(options: SmartHomeOptions, context: StepContext) -> None:
    build = importlib.import_module(SMART_HOME_MODULE).build  # hassil is needed only when the rows are built
    build(options, context.output_dir)
    write_manifest(context.output_dir, "dataset", context.provenance)


def _read_files(dataset: FilesDataset, spec: Spec, config: FilesConfig, context: StepContext) -> None:
    job = context.job(
        RowsJob,
        train_path=dataset.train,
        heldout_path=dataset.heldout,
        heldout_share=config.heldout_share,
        seed=config.seed,
        data=spec.data,
    )
    context.run_program("training.data.rows", job)
