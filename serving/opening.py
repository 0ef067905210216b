"""A model folder as a service, for whatever answers with it: a replica behind HTTP, or a worker of a batch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from infra.chat import load_codec
from infra.contracts import MANIFEST_NAME, read_manifest
from infra.errors import ArtifactError
from infra.files import read_json
from serving.admission import Gate
from serving.config import ServeConfig
from serving.engines.registry import make_engine
from serving.metrics import make_metrics
from serving.service import ServedModel, Service


def make_service(model_dir: Path, model_name: str, limits: ServeConfig, gate: Gate, replica: str = "") -> Service:
    """The service of a model folder; its engine is not started yet. Raises ArtifactError where the folder lacks what the API needs."""
    model = read_served_model(model_dir, model_name)
    adapters = {name: read_adapter(folder, name, model) for name, folder in limits.adapters.items()}
    engine = make_engine(model_dir, limits)
    metrics = make_metrics(model_name, engine, gate, replica, min(limits.max_adapters, len(adapters)))
    return Service(replace(model, adapters=adapters), engine, load_codec(model_dir), limits, metrics, gate)


def read_served_model(model_dir: Path, model_name: str) -> ServedModel:
    """The facts of a model folder that the API needs. Raises ArtifactError where its manifest has none."""
    manifest = read_manifest(model_dir)
    if manifest.model is None:
        raise ArtifactError(f"{model_dir}: its manifest holds no model facts. Run the quantize step again.")
    return ServedModel(
        name=model_name,
        fingerprint=f"fp_{manifest.digest[:16]}",
        context_tokens=manifest.model.context_tokens,
        vocabulary_tokens=int(read_json(model_dir / "config.json")["vocab_size"]),
        stop_ids=manifest.model.stop_ids,
        created_s=created_s(model_dir),
    )


def read_adapter(folder: Path, name: str, model: ServedModel) -> ServedModel:
    """The facts of one adapter beside `model`."""
    fingerprint = f"fp_{read_manifest(folder).digest[:16]}"
    return replace(model, name=name, fingerprint=fingerprint, created_s=created_s(folder), parent=model.name)


def created_s(folder: Path) -> int:
    """When an artifact was complete."""
    return int((folder / MANIFEST_NAME).stat().st_mtime)
