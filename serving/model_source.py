"""How a replica gets what it serves onto its own node: by digest, checked, once for all replicas there."""

from __future__ import annotations

from pathlib import Path

from infra import registry, tracking, uploads
from infra.artifact_store import open_store
from infra.contracts import read_manifest
from infra.errors import ArtifactError, ConfigError
from infra.settings import Settings
from serving.cluster_config import ClusterConfig, ModelSource, PathSource, RegistrySource
from serving.config import ServeConfig, ServeJob
from serving.limits import with_engine_of


def fetch(source: ModelSource, settings: Settings) -> Path:
    """The artifact's folder on this node, fetched where it has none.

    Raises ArtifactError where it is not what the digest says, RegistryError where there is no such version, ConfigError where no store is
    named, TransientError where what holds it cannot be reached.
    """
    if isinstance(source, PathSource):
        return _of_path(source)
    if (found := uploads.find_here(source.digest, settings.artifacts_dir)) is not None:
        return found
    if isinstance(source, RegistrySource):
        return _of_version(source, settings)
    if settings.store is None:
        raise ConfigError(
            f"the model is to come from the store by its digest {source.digest}, and SLIPWAY_STORE is not set. Set it to the store's URL."
        )
    return open_store(settings.store).fetch_digest(source.digest, settings.artifacts_dir)


def _of_path(source: PathSource) -> Path:
    held = read_manifest(source.path).digest
    if source.digest not in (None, held):
        raise ArtifactError(
            f"{source.path}: holds the artifact {held}, and {source.digest} is to be served. Put that one there, or change the digest."
        )
    return source.path


def _of_version(source: RegistrySource, settings: Settings) -> Path:
    mlflow = tracking.client(settings.tracking_uri)
    version = registry.lookup(mlflow, source.name, source.version)
    if version.digest != source.digest:
        raise ArtifactError(
            f"{source.name} version {source.version}: its digest is {version.digest}, and {source.digest} is to be served. "
            "Take the digest that `slipway status --json` shows, or another version."
        )
    if version.is_local:
        raise ArtifactError(
            f"{source.name} version {source.version}: its files lie on the machine that registered it ({version.source}), where no pod "
            "reaches them. Register it with a tracking server, or push it to the store and take `type: store`."
        )
    return uploads.download(mlflow, version.run_id, version.digest, settings.artifacts_dir)


def job_on_this_node(config: ClusterConfig, pool_name: str, settings: Settings) -> ServeJob:
    """What one machine would be told: every source a folder of this node. Raises what `fetch` does."""
    model_dir = fetch(config.pool_models.get(pool_name, config.model), settings)
    serve = with_engine_of(config.per_pool[pool_name], read_manifest(model_dir).weight_format)
    adapters = {name: fetch(source, settings) for name, source in config.adapters.items()}
    return ServeJob(
        output_dir=settings.home / "serving",
        model_dir=model_dir,
        model_name=config.model_name,
        serve=ServeConfig.model_validate(serve.model_dump(exclude_unset=True) | {"adapters": adapters}),
        pool=config.pool(pool_name),
    )
