"""The values of the chart helm/tracking: the MLflow server, its database and its files."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from infra.config import Config
from infra.kube import ChartValues, Disruption, Image, KubeModel, Probe, Resources, Scheduling
from infra.kube_entry import Ingress, Route, Service
from infra.kube_types import HostName, Name, OptionalName, SecretKeyName
from infra.kube_volumes import Storage


class Database(KubeModel):
    """PostgreSQL, by reference; without one MLflow keeps a SQLite file on the volume."""

    existing_secret: OptionalName = ""
    """Secret with the address; empty means SQLite, with one server."""
    key: SecretKeyName = "uri"
    """Key in it, whose value reads `postgresql+psycopg://USER:PASSWORD@HOST:5432/NAME`."""
    migrate: bool = True
    """Whether a Job brings the tables up to this version of MLflow before each install and upgrade. Back the database up before."""
    migration_deadline_seconds: int = Field(3600, ge=10)
    """Longest time that may take."""


class Artifacts(KubeModel):
    """Where the files of runs and models are kept; clients reach them through the server."""

    destination: str = Field("", pattern=r"^((s3|gs|wasbs|abfss)://[A-Za-z0-9._~%/:@-]+)?$")
    """URL such as `s3://bucket/mlflow`; empty means on the volume, with one server."""
    existing_secret: OptionalName = ""
    """Secret whose keys become environment variables, such as AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, MLFLOW_S3_ENDPOINT_URL."""


class Authentication(KubeModel):
    """MLflow's own users and passwords (`--app-name basic-auth`)."""

    existing_secret: OptionalName = ""
    """Secret with the keys `basic_auth.ini` (MLflow's form, with `database_uri`), `admin-username`, `admin-password` and
    `flask-secret-key`. Empty means that whoever reaches the server may use it."""


class ServerConfig(Config):
    """What the server is told beside its addresses."""

    workers: int = Field(2, ge=1, le=64)
    """Processes that answer."""
    allowed_hosts: tuple[HostName, ...] = ()
    """More names by which the server may be called; those of its Service, Ingress and route, and private addresses, are allowed anyway."""
    cors_allowed_origins: tuple[Annotated[str, Field(pattern=r"^https?://[A-Za-z0-9.:-]+$")], ...] = ()
    """Web pages, beside its own, whose scripts may call it."""


class Values(ChartValues, Scheduling):
    """The values of helm/tracking."""

    image: Image = Image(repository="slipway-tracking")
    """Image of the server and of the migration."""
    replicas: int = Field(1, ge=1, le=100)
    """Servers; more than one needs `database.existingSecret` and `artifacts.destination`."""
    resources: Resources = Resources(requests={"cpu": "500m", "memory": "1Gi"}, limits={"memory": "2Gi"})
    """Of the server."""
    database: Database = Database()
    artifacts: Artifacts = Artifacts()
    storage: Storage = Storage()
    """Volume for what lies in neither database nor bucket; there is none where nothing does. The one that the chart makes outlives the
    release, as it holds every model."""
    authentication: Authentication = Authentication()
    service: Service = Service(port=5000)
    ingress: Ingress = Ingress()
    route: Route = Route()
    client_namespaces: list[Name] = Field(default_factory=list)
    """Namespaces, beside the release's own, whose pods the NetworkPolicy lets in, such as the Ingress controller's."""
    disruption: Disruption = Disruption()
    """Of the servers, where there are several."""
    readiness: Probe = Probe(period_seconds=5, timeout_seconds=5)
    """Times of the probe of `/health`, by which a server gets requests."""
    liveness: Probe = Probe(period_seconds=20, timeout_seconds=10)
    """Times of the probe of `/health`, by which a server is started again."""
    startup: Probe = Probe(period_seconds=3, timeout_seconds=5, failure_threshold=60)
    """Times of the probe of `/health`, until which a server counts as starting: SQLite's tables are made and migrated then."""
    config: ServerConfig = ServerConfig()
    """What the server is told beside its addresses."""

    @model_validator(mode="after")
    def _several_share_their_stores(self) -> Self:
        if self.replicas > 1 and not (self.database.existing_secret and self.artifacts.destination):
            raise ValueError(
                f"replicas {self.replicas} would each have a database or files of its own. "
                "Set database.existingSecret and artifacts.destination, or replicas to 1."
            )
        return self
