"""The one spec file: everything a run is told."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from infra.config import Config, apply_overrides, load_yaml, parse
from infra.files import sha256_json
from pipelines.datasets.options import SmartHomeOptions
from pipelines.measures import EvaluateConfig, GatesConfig, gate_problems
from serving.config import BatchConfig, ServeConfig
from serving.formats import QuantizeConfig
from training.config import DataConfig, DataSources, TrainConfig

NAME_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,62}$"


class SmartHomeDataset(SmartHomeOptions):
    """Built from the sentence templates of a real voice assistant; see pipelines/datasets/smart_home.py."""

    type: Literal["smart_home"]


class FilesDataset(Config):
    """Files of your own, or datasets of the hub."""

    type: Literal["files"]
    train: DataSources
    """Training rows: a path, or a list of paths or sources; a relative path starts at the spec file's folder."""
    heldout: DataSources | None = None
    """Held-out rows, likewise; absent means a seeded part of the training rows."""
    heldout_share: float = Field(0.1, gt=0, lt=1)
    """Part of the training rows held out when no file is given."""
    seed: int = Field(0, ge=0)


Dataset = Annotated[SmartHomeDataset | FilesDataset, Field(discriminator="type")]


class ProveConfig(Config):
    """The chats on which every stage, from the trained model to the running server, is compared."""

    heldout_prompts: int = Field(16, ge=1, le=1000)
    """Held-out rows among them, drawn by `seed`."""
    long_tokens: int = Field(1024, ge=32)
    """Tokens of the longest chat, or as many as the context holds; it is read once by every model."""
    max_new_tokens: int = Field(24, ge=1, le=1024)
    """Longest answer to the chats that are not of the dataset."""
    live: bool = True
    """Whether a server is started for each candidate and asked over HTTP."""
    tolerance: float = Field(1.0, gt=0)
    """Factor on how far log-probabilities may lie apart (`pipelines/proof/bounds.py`)."""
    seed: int = 0


class Spec(Config):
    """From a base model and a dataset to a served model."""

    name: str = Field(pattern=NAME_PATTERN)
    """Name of the model in the registry and at the API."""
    base_model: str
    """`file:PATH`, `package:DISTRIBUTION/FILE` or `hf:OWNER/NAME[@REVISION]`."""
    dataset: Dataset
    train_limit_rows: int | None = Field(None, ge=1)
    """Only the first so many training rows are used; absent means all."""
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    quantize: QuantizeConfig = QuantizeConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    prove: ProveConfig = ProveConfig()
    gates: GatesConfig = GatesConfig()
    serve: ServeConfig = ServeConfig()
    batch: BatchConfig = BatchConfig()
    experiment: str = "slipway"
    """MLflow experiment."""
    usd_per_hour: float | None = Field(None, ge=0)
    """Price of this machine; absent means that cost is reported in hours only."""

    @model_validator(mode="after")
    def _gates_are_measured(self) -> Spec:
        if problems := gate_problems(self.evaluate, self.gates):
            raise ValueError("; ".join(problems))
        return self

    @property
    def merged_by(self) -> str:
        """The step that makes the 16-bit model: full fine-tuning leaves nothing to merge."""
        return "train" if self.train.method == "full" else "merge"

    @property
    def fingerprint(self) -> str:
        """sha256 over what the spec says; names a spec in provenance."""
        return sha256_json(self.model_dump(mode="json"))


def load_spec(path: Path, overrides: list[str]) -> Spec:
    """The spec at `path` with `--set` overrides applied and its dataset paths made absolute. Raises ConfigError with every problem."""
    data = apply_overrides(load_yaml(path), overrides)
    _anchor(data, path.absolute().parent)
    return parse(Spec, data, str(path))


def _anchor(data: dict[str, Any], folder: Path) -> None:
    dataset = data.get("dataset")
    if isinstance(dataset, dict):
        for key in ("train", "heldout"):
            if key in dataset:
                dataset[key] = _anchored(dataset[key], folder)
    evaluate = data.get("evaluate")
    tasks = evaluate.get("lm_eval") if isinstance(evaluate, dict) else None
    if isinstance(tasks, dict) and "folder" in tasks:
        tasks["folder"] = _anchored(tasks["folder"], folder)
    source = data.get("base_model")
    if isinstance(source, str) and source.startswith("file:"):
        data["base_model"] = f"file:{folder / Path(source.removeprefix('file:')).expanduser()}"


def _anchored(value: Any, folder: Path) -> Any:
    """A dataset path, a source, or a list of them, with paths made absolute; the hub's names stay."""
    if isinstance(value, list):
        return [_anchored(each, folder) for each in value]
    if isinstance(value, dict):
        return {**value, "path": _anchored(value["path"], folder)} if "path" in value else value
    if not isinstance(value, str) or value.startswith("hf:"):
        return value
    return str(folder / Path(value).expanduser())
