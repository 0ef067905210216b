"""The Ray Serve application of a cluster: `import_path: serving.cluster_app:build`, with the config itself as argument.

- With the config as argument, and not the path of a file, Ray Serve sees each change of it, and exchanges the replicas one after the other.
- Nothing of the model is read where the application is built (the head node); each replica fetches, checks and trusts for itself.
- Requests come over the gateways, not over Ray Serve's proxy, which only rings for a model that sleeps.
"""

from __future__ import annotations

import asyncio
import hmac
from typing import Any

import ray
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import PlainTextResponse

from infra.config import parse
from infra.errors import ConfigError
from infra.settings import ClusterAddresses, load_cluster_addresses, load_settings
from serving.adapters import require_adapters
from serving.announcement import TOKEN_HEADER, FrontAddress, Place
from serving.autoscaling.ray_policy import ray_options
from serving.cluster_config import ClusterArguments, ClusterConfig
from serving.config import DEPLOYMENT_NAME, ServeConfig, ServeJob
from serving.deployment import ModelReplica
from serving.engines.registry import verify_model
from serving.interpreter import engine_python
from serving.model_source import job_on_this_node
from serving.node import node_dir
from serving.trust import require_all_trusted, settled_trust

RESOURCES = ("slipway_cpu", "slipway_gpu")
"""Ray's resource of a node whose image has the engines for a CPU, for a GPU: a replica asks for a little of one, however many there are."""
A_LITTLE = 0.001
NUM_TRIES = 3  # a store that is away for a moment is no reason to give the application up


def build(arguments: dict[str, Any]) -> Application:
    """The application of the whole model, or of one of its pools. Raises ConfigError where the config is none."""
    asked = parse(ClusterArguments, arguments, "the application's args")
    config = asked.config
    if asked.pool not in config.per_pool:
        raise ConfigError(f"pool {asked.pool!r}: the config has {sorted(config.per_pool)}. Name one of these.")
    limits = config.per_pool[asked.pool]
    model = serve.deployment(
        ClusterReplica,
        name=DEPLOYMENT_NAME,
        **ray_options(limits),
        ray_actor_options=actor_options(limits),
        # The gateways live on, so a replica that goes finishes its answers, however long.
        graceful_shutdown_timeout_s=limits.request_timeout_s,
        graceful_shutdown_wait_loop_s=0.1,
        health_check_period_s=5.0,
        max_constructor_retry_count=NUM_TRIES,
    ).bind(config.model_dump_json(exclude_unset=True), asked.pool)
    if not limits.may_sleep:
        return model
    return serve.deployment(Bell, name="bell", ray_actor_options={"num_cpus": 0}).bind(model)


def actor_options(limits: ServeConfig) -> dict[str, Any]:
    """What one replica asks of Ray."""
    resource = RESOURCES[int(limits.gpus_per_replica > 0)]
    return {"num_cpus": limits.cpus_per_replica, "num_gpus": limits.gpus_per_replica, "resources": {resource: A_LITTLE}}


def settle(config: ClusterConfig, pool: str) -> ServeJob:
    """What the replica of this node is told, all of it checked as before a server of one machine starts.

    Raises what `fetch` does, ArtifactError where the model is not signed by a trusted key or an adapter is of another base, ConfigError
    where the engine does not read the model.
    """
    job = job_on_this_node(config, pool, load_settings())
    limits = settled_trust(job.serve)
    require_adapters(limits, job.model_dir, verify_model(job.model_dir, limits))
    require_all_trusted(job.model_dir, job.model_name, limits)
    return job.model_copy(update={"serve": limits.model_copy(update={"engine_python": engine_python(limits)})})


def place(config: ClusterConfig, addresses: ClusterAddresses) -> Place:
    """Where the replica of this node stands. Raises ConfigError where the environment names no gateway."""
    if not addresses.gateways:
        raise ConfigError("SLIPWAY_GATEWAYS is empty: a replica that no gateway knows is asked nothing. Set it to host:port.")
    return Place(
        fronts=tuple(FrontAddress(host=host, port=port, token=addresses.front_token) for host, port in addresses.gateways),
        host=ray.util.get_node_ip_address(),
        ports=(config.first_replica_port, config.first_replica_port + config.num_replica_ports - 1),
        node_dir=node_dir(),
    )


class ClusterReplica(ModelReplica):
    """A replica that first gets what it serves."""

    async def __init__(self, config_json: str, pool: str) -> None:  # type: ignore[misc]  # Ray Serve awaits it
        config = ClusterConfig.model_validate_json(config_json)
        standing = place(config, load_cluster_addresses())
        job = await asyncio.to_thread(settle, config, pool)
        await super().__init__(job.model_dump_json(), standing.as_json())  # type: ignore[misc]


class Bell:
    """Rings for a replica: a call that waits at a handle counts as demand (`wake.py`). It has no model and always runs."""

    def __init__(self, model: DeploymentHandle) -> None:
        self._model = model
        self._token = load_cluster_addresses().front_token.get_secret_value().encode()

    async def __call__(self, request: Request) -> PlainTextResponse:
        """Rings, where a gateway asks."""
        if not hmac.compare_digest(request.headers.get(TOKEN_HEADER, "").encode(), self._token):
            return PlainTextResponse("only gateways ring here", 403)
        self._model.wake.remote()
        return PlainTextResponse("rung")
