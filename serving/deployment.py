"""The model as one Ray Serve deployment.

The replica loads neither torch nor transformers, whatever its engine: that is a process of its own, and the codec needs `tokenizers` only.
OpenVINO's process loads neither too.
"""

from __future__ import annotations

from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayError
from ray.serve import Application

from serving import request_log
from serving.admission import Gate
from serving.config import ServeJob
from serving.engines.base import EngineError
from serving.metrics import merge
from serving.openai_api import build_api
from serving.opening import make_service

APPLICATION_NAME = "slipway"
DEPLOYMENT_NAME = "model"
# Ray Serve must never be the one to queue: it would hold what our own limit is to refuse, and health checks with it.
SPARE_REQUESTS = 1024
METRICS_TIMEOUT_S = 3.0


def build_app(job: ServeJob) -> Application:
    """The Ray Serve application of one model; nothing is loaded before a replica starts."""
    serve_config = job.serve
    deployment = serve.deployment(
        OpenAIServer,
        name=DEPLOYMENT_NAME,
        num_replicas=serve_config.num_replicas,
        ray_actor_options={"num_cpus": serve_config.cpus_per_replica or 1},
        max_ongoing_requests=serve_config.max_running_requests + serve_config.max_queued_requests + SPARE_REQUESTS,
        graceful_shutdown_timeout_s=serve_config.drain_timeout_s,
        graceful_shutdown_wait_loop_s=0.1,
        health_check_period_s=5.0,
        max_constructor_retry_count=1,  # a folder that cannot be loaded now cannot be loaded a second later
    )
    return deployment.bind(job.model_dump_json())


@serve.ingress()
class OpenAIServer:
    """One replica: an engine, and the API in front of it."""

    async def __init__(self, job_json: str) -> None:  # type: ignore[misc]  # Ray Serve awaits it, on the loop that serves
        job = ServeJob.model_validate_json(job_json)
        limits = job.serve
        replica = serve.get_replica_context().replica_tag
        request_log.write_to(job.output_dir.absolute(), replica)
        gate = Gate(limits.max_running_requests, limits.max_queued_requests)
        self._service = make_service(job.model_dir, job.model_name, limits, gate, replica)
        self._engine = self._service.engine
        await self._engine.start()

    def __serve_build_asgi_app__(self) -> FastAPI:  # Ray Serve asks for the app by this name once the constructor is done
        return build_api(self._service, self._all_metrics if self._service.limits.num_replicas > 1 else None)

    async def metrics_text(self) -> str:
        """This replica's figures, for the one that answers a scrape."""
        return self._service.metrics.text

    async def _all_metrics(self) -> str:
        """The figures of all replicas that answer; those of this one alone where one hangs."""
        handle = serve.get_deployment_handle(DEPLOYMENT_NAME, APPLICATION_NAME)
        try:
            answers = await handle.broadcast("metrics_text").results_async(timeout_s=METRICS_TIMEOUT_S, return_exceptions=True)
        except (RayError, TimeoutError):
            answers = []
        return merge([answer for answer in answers if isinstance(answer, str)] or [self._service.metrics.text])

    async def check_health(self) -> None:
        """Raises EngineError when the engine cannot answer any more; Ray Serve then replaces this replica."""
        if self._engine.failure is not None:
            raise EngineError(self._engine.failure)
