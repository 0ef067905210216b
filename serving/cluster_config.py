"""What can be said about serving on a Ray cluster; light, and as the chart's values carry it under `config:`.

- Settings of one machine that mean a folder of it are said here by digest instead: each replica fetches what it serves to its own node.
- Addresses and secrets are no part of it; the pods get them from their environment (`infra/settings.py`, `ClusterAddresses`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from infra.config import Config
from serving.config import AdapterName, PoolConfig, ServeConfig

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
OWN_HOSTS = ("127.0.0.1", "localhost", "::1")


class RegistrySource(Config):
    """A version in the MLflow registry whose files lie in its run."""

    type: Literal["registry"] = "registry"
    name: str = Field(min_length=1)
    """Registered model."""
    version: str = Field(pattern=r"^[0-9]+$")
    """Number of the version. An alias is no source: it would mean another model on a replica that starts later."""
    digest: Digest
    """Content digest that the version must have (`slipway status NAME --json`)."""


class StoreSource(Config):
    """An artifact in the store that `SLIPWAY_STORE` names."""

    type: Literal["store"] = "store"
    digest: Digest
    """Content digest of the artifact."""


class PathSource(Config):
    """A folder that every pod has at the same path: of a volume, or in the image."""

    type: Literal["path"] = "path"
    path: Path
    """Absolute path of the artifact's folder."""
    digest: Digest | None = None
    """Content digest that it must have; absent means whatever lies there. It is checked against its own manifest either way."""

    @model_validator(mode="after")
    def _check_path(self) -> PathSource:
        if not self.path.is_absolute():
            raise ValueError(f"path is {str(self.path)!r}. Give the absolute path at which every pod has the folder.")
        return self


ModelSource = Annotated[RegistrySource | StoreSource | PathSource, Field(discriminator="type")]


class ClusterConfig(Config):
    """One model behind several gateways, on the replicas of a Ray cluster."""

    model_name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,127}$")
    """The name clients ask for."""
    model: ModelSource
    """What is served. With another digest the replicas are exchanged one after the other, and nothing else is."""
    adapters: dict[AdapterName, ModelSource] = Field(default_factory=dict)
    """LoRA adapters beside the model by name, in place of `serve.adapters`."""
    pool_models: dict[str, ModelSource] = Field(default_factory=dict)
    """Models of pools whose engine reads another form than `model` has, by the pool's name, in place of a pool's `model_dir`."""
    serve: ServeConfig
    """All else, as on one machine. Its paths are those in the pods."""
    announce_port: int = Field(8001, ge=1, le=65535)
    """Port of each gateway at which replicas make themselves known."""
    first_replica_port: int = Field(20000, ge=1024, le=65535)
    """First port that replicas listen at; each takes the first of `num_replica_ports` that is free on its node."""
    num_replica_ports: int = Field(64, ge=1, le=4096)
    """How many ports the replicas of one node have to choose from. The NetworkPolicy opens these to the gateways."""
    leave_s: float = Field(5.0, ge=0)
    """How long a gateway that is told to stop goes on taking requests while `/health` already answers 503: until then the load balancers
    may still send it some. After that come at most `serve.drain_timeout_s` for the running ones."""

    @model_validator(mode="after")
    def _check_serve(self) -> ClusterConfig:
        if problems := [*self._address_problems(), *self._place_problems(), *self._pool_problems()]:
            raise ValueError(" ".join(problems))
        return self

    def _address_problems(self) -> list[str]:
        problems = []
        if self.serve.host in OWN_HOSTS:
            problems.append(
                f"serve.host is {self.serve.host!r}, at which only a gateway's own pod reaches it. Set it to '0.0.0.0' or '::'."
            )
        if self.first_replica_port + self.num_replica_ports - 1 > 65535:
            problems.append(f"first_replica_port {self.first_replica_port} and num_replica_ports {self.num_replica_ports} go past 65535.")
        if self.announce_port == self.serve.port:
            problems.append(f"announce_port and serve.port are both {self.serve.port}. Give one of them another port.")
        return problems

    def _place_problems(self) -> list[str]:
        serve, problems = self.serve, []
        if serve.adapters:
            problems.append("serve.adapters names folders of one machine. Say them in `adapters`, by digest.")
        draft_dir = serve.speculative.draft_model_dir if serve.speculative else None
        paths = {"api_keys_file": serve.api_keys_file, "trusted_keys_file": serve.trusted_keys_file, "engine_python": serve.engine_python}
        for name, path in {**paths, "speculative.draft_model_dir": draft_dir}.items():
            if path is not None and not path.is_absolute():
                problems.append(f"serve.{name} is {str(path)!r}. Give the absolute path that it has in the pods.")
        if self.model_name in self.adapters:
            problems.append(f"the model and one of `adapters` are both named {self.model_name!r}. Give the adapter another name.")
        return problems

    def _pool_problems(self) -> list[str]:
        problems = [
            f"pools.{pool.name}.model_dir is a folder of one machine. Say it in `pool_models`."
            for pool in self.serve.pools
            if pool.model_dir
        ]
        names = {pool.name for pool in self.serve.pools}
        problems += [f"pool_models names {name!r}, which is no pool." for name in sorted(set(self.pool_models) - names)]
        for name, config in self.per_pool.items():
            if config.cpus_per_replica is None:
                where = f"of pool {name} " if name else ""
                problems.append(
                    f"cpus_per_replica {where}is absent: on a cluster there is no machine whose cores could be shared out. Set it."
                )
        return problems

    @property
    def per_pool(self) -> dict[str, ServeConfig]:
        """The settings of each pool's replicas by its name; of all replicas under the empty name where there are no pools."""
        return {pool.name: self.serve.of_pool(pool) for pool in self.serve.pools} or {"": self.serve}

    def pool(self, name: str) -> PoolConfig | None:
        """The pool of that name; None for the empty one."""
        return next((pool for pool in self.serve.pools if pool.name == name), None)

    @property
    def front_limits(self) -> ServeConfig:
        """The settings as a gateway needs them: it knows adapters by name only."""
        return self.serve.model_copy(update={"adapters": {name: Path(name) for name in self.adapters}})

    def wake_path(self, pool: str) -> str:
        """Where Ray Serve's proxy is asked to ring for a pool that sleeps."""
        return f"/wake/{pool}" if pool else "/wake"

    @property
    def first_awake(self) -> str | None:
        """The pool that is woken first: the cheapest of those that may sleep; None where none may."""
        sleepers = [name for name, config in self.per_pool.items() if config.may_sleep]
        return min(sleepers, key=lambda name: pool.usd_per_hour if (pool := self.pool(name)) else 0.0, default=None)


class ClusterArguments(Config):
    """Arguments of one application of Ray Serve."""

    config: ClusterConfig
    pool: str = ""
    """The pool that it runs; empty where there are no pools."""
