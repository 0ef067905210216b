"""Where a chart's programs keep what outlives their pods: artifacts, and MLflow's runs and models."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from infra.kube import KubeModel
from infra.kube_types import OptionalName

STORE_PATTERN = r"^[a-z][a-z0-9+.-]*://[A-Za-z0-9._~%/:@-]+$"


class ArtifactStore(KubeModel):
    """Where artifacts travel between driver, jobs and servers (`SLIPWAY_STORE`)."""

    url: str = Field("", pattern=f"{STORE_PATTERN}|^$")
    """fsspec URL, such as `s3://bucket/slipway`, or `file:///mnt/store` with `existingClaim`."""
    existing_secret: OptionalName = ""
    """Secret whose keys become environment variables, such as AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL."""
    existing_claim: OptionalName = ""
    """PersistentVolumeClaim, shared by all nodes, that is mounted at a `file://` URL's path."""

    @model_validator(mode="after")
    def _volume_has_a_path(self) -> Self:
        if self.url.startswith("file:") != bool(self.existing_claim):
            raise ValueError(
                f"url {self.url!r} with existingClaim {self.existing_claim!r}: a file:///PATH needs a shared volume, others none."
            )
        return self


class Tracking(KubeModel):
    """The MLflow server."""

    uri: str = Field("", pattern=r"^(https?://[A-Za-z0-9._:/-]+)?$")
    """Its address; it may hold no password."""
    existing_secret: OptionalName = ""
    """Secret whose keys become environment variables, such as MLFLOW_TRACKING_TOKEN."""
