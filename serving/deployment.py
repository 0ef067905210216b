"""The model as one Ray Serve deployment.

The replica loads neither torch nor transformers, whatever its engine: that is a process of its own, and the codec needs `tokenizers` only.
OpenVINO's process loads neither too.
"""

from __future__ import annotations

import asyncio
import socket
import time
from dataclasses import asdict
from typing import Any

from prometheus_client import Gauge
from ray import serve
from ray.serve import Application

from infra.chat import ChatCodec
from serving import request_log
from serving.admission import Gate
from serving.announcement import Announcement, FrontAddress, Place
from serving.autoscaling.load import ReplicaLoad
from serving.autoscaling.ray_policy import ray_options
from serving.config import DEPLOYMENT_NAME, ServeJob
from serving.engines.base import Engine, EngineError, Sampling
from serving.fleet import Fleet
from serving.metrics import LABELS
from serving.node import Standing
from serving.openai_api import build_api
from serving.opening import make_service
from serving.replica_http import FromFront, ReplicaServer
from serving.tracing import make_tracer
from serving.trust import require_all_trusted

WARM_UP_TOKENS = 2
LOOK_S = 0.2
LAST_REQUESTS_S = 0.5  # fronts that have not yet read that it drains may send it some


def build_app(job: ServeJob, front: FrontAddress) -> Application:
    """The Ray Serve application of one model; nothing is loaded before a replica starts.

    Requests reach the replicas through the front and not through Ray, which starts, watches and ends them.
    """
    serve_config = job.serve
    deployment = serve.deployment(
        ModelReplica,
        name=DEPLOYMENT_NAME,
        **ray_options(serve_config),
        ray_actor_options={"num_cpus": serve_config.cpus_per_replica or 1, "num_gpus": serve_config.gpus_per_replica},
        # A replica that is one too many finishes its answers, however long; at the end of the server, the front's own limit comes first.
        graceful_shutdown_timeout_s=serve_config.request_timeout_s if serve_config.autoscale else serve_config.drain_timeout_s,
        graceful_shutdown_wait_loop_s=0.1,
        health_check_period_s=5.0,
        max_constructor_retry_count=1,  # a folder that cannot be loaded now cannot be loaded a second later
    )
    return deployment.bind(job.model_dump_json(), Place(fronts=(front,)).as_json())


class ModelReplica:
    """One replica: an engine, the API in front of it at a port of its own, and a connection to each front that tells of it."""

    async def __init__(self, job_json: str, place_json: str) -> None:  # type: ignore[misc]  # Ray Serve awaits it, on the loop that serves
        started_s = time.perf_counter()
        job, place = ServeJob.model_validate_json(job_json), Place.model_validate_json(place_json)
        limits, token = job.serve, place.fronts[0].token
        self._name = serve.get_replica_context().replica_tag
        request_log.write_to(job.output_dir.absolute(), self._name)
        self._tracer = make_tracer(self._name)
        require_all_trusted(job.model_dir, job.model_name, limits)
        gate = Gate(limits.max_running_requests, limits.max_queued_requests)
        self._service = make_service(job.model_dir, job.model_name, limits, gate, self._name)
        self._engine, metrics = self._service.engine, self._service.metrics
        await self._engine.start()
        await warm_up(self._engine, self._service.codec)
        host = place.host or own_address(place.fronts[0].host)
        self._server = ReplicaServer(FromFront(build_api(self._service, self._tracer), token.get_secret_value()), host, place.ports)
        self._standing = Announcement(
            token=token, replica=self._name, host=host, port=self._server.port, num_places=limits.max_running_requests,
            pool=job.pool_name, usd_per_hour=job.pool.usd_per_hour if job.pool else 0.0,
        )  # fmt: skip
        ready = Gauge("slipway_replica_start_seconds", "From being asked for to ready.", LABELS, registry=metrics.registry)
        ready.labels(*metrics.labels).set(time.perf_counter() - started_s)
        self._fleet = Fleet(place.fronts, lambda: self._standing, self._tracer.flush)
        self._fleet.start()
        self._node = Standing(place.node_dir, self._name) if place.node_dir else None
        self._watch = asyncio.create_task(self._tell_changes()) if limits.adapters or self._node else None

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What the autoscaling policy knows of this replica; Ray Serve asks for it by this name where there is a policy."""
        gate, recent = self._service.gate, self._service.metrics.recent_first_tokens
        return asdict(ReplicaLoad(gate.num_running, gate.num_waiting, gate.longest_wait_s, *recent.figures()))

    async def _tell_changes(self) -> None:
        """Tells the fronts of the adapters in memory, whenever they have changed; leaves when the node is to be drained."""
        while True:
            held = self._engine.figures.adapters
            if held != self._standing.adapters:
                self._tell(adapters=held)
            if self._node is not None and self._node.must_drain and not self._standing.is_draining:
                self._tell(is_draining=True)
                self._leaving = asyncio.create_task(self._leave(self._node))
            await asyncio.sleep(LOOK_S)

    def _tell(self, **changes: Any) -> None:
        self._standing = self._standing.model_copy(update=changes)
        self._fleet.update()

    async def _leave(self, node: Standing) -> None:
        await asyncio.sleep(LAST_REQUESTS_S)
        await self._server.drain()
        node.leave()

    async def wake(self) -> None:
        """Nothing; that a request waits for it is what brings a replica up where there is none."""

    async def check_health(self) -> None:
        """Raises EngineError when the engine cannot answer any more; Ray Serve then replaces this replica."""
        if self._engine.failure is not None:
            raise EngineError(self._engine.failure)

    async def __del__(self) -> None:  # type: ignore[misc]  # Ray Serve awaits it before it ends the replica
        if self._watch is not None:
            self._watch.cancel()
        self._tell(is_draining=True)
        await self._server.drain()
        if self._node is not None:
            self._node.leave()
        await self._fleet.stop()
        await self._server.stop()
        await asyncio.to_thread(self._tracer.stop)
        await self._engine.stop()


async def warm_up(engine: Engine, codec: ChatCodec) -> None:
    """One answer for nobody: kernels are made and memory is touched before the first request. Raises EngineError."""
    async for _ in engine.generate(codec.encode_text("ready"), Sampling(max_tokens=WARM_UP_TOKENS)):
        pass


def own_address(front_host: str) -> str:
    """The address at which the front reaches this machine: the one that a packet to it would leave from. Nothing is sent."""
    with socket.socket(socket.AF_INET6 if ":" in front_host else socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((front_host, 1))
        return str(probe.getsockname()[0])
