"""What can be said about serving; light, so that the driver can check a spec without an engine."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from infra.config import Config
from infra.process import Job

APPLICATION_NAME = "slipway"
DEPLOYMENT_NAME = "model"
"""Ray Serve's names for the one model and all that serves it."""
EngineName = Literal["openvino", "torch"]
Precision = Literal["auto", "f32", "bf16"]
EngineWeights = Literal["full", "int8", "nf4"]


class QuantizeConfig(Config):
    """How the merged model is made small for its engine."""

    format: Literal["openvino-int8"] = "openvino-int8"
    """Weight format; names the model in scores, gates and the registry."""


class AutoscaleConfig(Config):
    """A number of replicas that follows what is asked of them."""

    min_replicas: int = Field(1, ge=0, le=1000)
    """Fewest replicas. With 0 a model that nobody asks stops, and the next request waits until one has started again."""
    max_replicas: int = Field(ge=1, le=1000)
    """Most replicas; a machine of one's own needs cores for all of them."""
    target_requests: int = Field(16, ge=1, le=4096)
    """Requests, running and waiting, that one replica should have in hand; for more, more replicas are asked for."""
    target_ttft_s: float = Field(1.0, gt=0)
    """Time to the first token; where requests wait longer, one replica more is asked for."""
    up_delay_s: float = Field(1.0, ge=0)
    """How long more must be needed before more are asked for."""
    down_delay_s: float = Field(120.0, ge=0)
    """How long fewer must do before one goes; then the same again before the next."""
    zero_delay_s: float = Field(300.0, ge=0)
    """How long the last one must be idle before it goes, where `min_replicas` is 0; idle it is ten seconds after an answer began."""

    @model_validator(mode="after")
    def _check_bounds(self) -> AutoscaleConfig:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas is {self.min_replicas} and max_replicas {self.max_replicas}. Raise the one or lower the other.")
        return self


class ServeConfig(Config):
    """One model behind the OpenAI API."""

    engine: EngineName = "openvino"
    """What computes: `openvino` reads the quantized model (CPU); `torch` is the reference, reads the merged model, on any device."""
    weights: EngineWeights = "full"
    """How `torch` holds the weights: as they are, or by bitsandbytes in 8 bits or in NF4. The other engine serves what was quantized."""
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = Field(8000, ge=1, le=65535)
    num_replicas: int = Field(1, ge=1, le=1000)
    """Replicas; with `autoscale`, those to begin with, as far as its bounds allow."""
    autoscale: AutoscaleConfig | None = None
    """How the number of replicas follows the load; absent means that it stays."""
    cpus_per_replica: int | None = Field(None, ge=1)
    """Cores of one replica; absent means this machine's cores shared among the most replicas that there can be."""
    max_running_requests: int = Field(64, ge=1, le=4096)
    """Requests one replica decodes together."""
    max_queued_requests: int = Field(256, ge=0)
    """Requests that may wait at one replica; further ones are answered 429 with Retry-After."""
    request_timeout_s: float = Field(600.0, gt=0, le=86_400)
    """Longest time from a request to the end of its answer; then 504, or an error event in a stream. A request may ask for less in
    the header `X-Request-Timeout-S`."""
    max_tokens_limit: int = Field(2048, ge=1)
    """Most new tokens one request may ask for."""
    default_max_tokens: int = Field(256, ge=1)
    """New tokens where a request does not say."""
    precision: Precision = "f32"
    """What `openvino` calculates in beside its 8-bit products; `auto` is bf16 where the processor has it. On a Xeon with AMX `f32` makes 1.5
    times the tokens/s of `auto` at one request, 1.2 times at 16, as many at 32, 0.8 of them at 64, and an answer depends less on others."""
    cache_gb: float = Field(1, ge=0.01, le=10_000)
    """Memory of the KV cache of one replica, in GB (2^30 bytes); taken as it fills."""
    max_body_bytes: int = Field(1 << 20, ge=1024)
    """Largest request body."""
    api_keys_file: Path | None = None
    """File that `slipway keys` writes; with it every request needs `Authorization: Bearer KEY`. Changes count within a second."""
    open_paths: tuple[Literal["/health", "/metrics"], ...] = ("/health", "/metrics")
    """Paths that need no key all the same; `[]` closes them too. Probes of Kubernetes can send no key."""
    log_prompts: bool = False
    """Whether the request log (`requests-REPLICA.jsonl` beside the server's own) holds what was asked, prompts and all."""
    start_timeout_s: float = Field(120.0, gt=0)
    """How long start-up may take before it counts as failed."""
    drain_timeout_s: float = Field(10.0, ge=0)
    """How long running requests may finish after a stop signal."""

    @property
    def first_replicas(self) -> int:
        """Replicas to begin with."""
        bounds = self.autoscale
        return self.num_replicas if bounds is None else min(max(self.num_replicas, bounds.min_replicas), bounds.max_replicas)

    @property
    def may_sleep(self) -> bool:
        """Whether it may have no replica at all while nobody asks."""
        return self.autoscale is not None and self.autoscale.min_replicas == 0

    @property
    def most_replicas(self) -> int:
        """Replicas that there can be at once."""
        return self.num_replicas if self.autoscale is None else self.autoscale.max_replicas


class QuantizeJob(Job):
    """`python -m serving.quantize.openvino`: the merged model in the engine's weight format."""

    merged_dir: Path
    quantize: QuantizeConfig = QuantizeConfig()


class PredictJob(Job):
    """`python -m serving.predict`: the engine's greedy answers to the held-out prompts."""

    model_dir: Path
    tokens_dir: Path
    max_new_tokens: int = Field(96, ge=1)
    limit_rows: int | None = Field(None, ge=1)


class ServeJob(Job):
    """`python -m serving.app`: serves until it is told to stop (SIGTERM or Ctrl-C)."""

    model_dir: Path
    model_name: str
    """The name clients ask for."""
    serve: ServeConfig = ServeConfig()
