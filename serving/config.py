"""What can be said about serving; light, so that the driver can check a spec without an engine."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from infra.config import Config
from infra.process import Job

EngineName = Literal["openvino", "torch"]
EngineWeights = Literal["full", "int8", "nf4"]
BatchFormat = Literal["jsonl", "parquet"]
BATCH_MANIFEST_NAME = "_batch.json"
"""In the folder of a batch's answers: what it is, and its result once it is complete."""


class QuantizeConfig(Config):
    """How the merged model is made small for its engine."""

    format: Literal["openvino-int8"] = "openvino-int8"
    """Weight format; names the model in scores, gates and the registry."""


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
    cpus_per_replica: int | None = Field(None, ge=1)
    """Cores of one replica; absent means this machine's cores shared among the replicas."""
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
    cache_gb: int = Field(1, ge=1)
    """Memory of the KV cache of one replica, in whole GB."""
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


class BatchConfig(Config):
    """How `slipway batch` reads rows of requests and writes their answers."""

    format: BatchFormat | None = None
    """Format of the answers; absent means that of the requests."""
    rows_per_part: int = Field(128, ge=1, le=100_000)
    """Rows of one file of answers, which is written whole or not at all; a kill costs each engine the few parts that it was answering."""
    ignored_fields: tuple[str, ...] = ()
    """Fields of a row that are no part of its request, labels for example; any other that is not known makes the row an error."""


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
    serve: ServeConfig = ServeConfig()
    """The engine, and what it may use."""


class ServeJob(Job):
    """`python -m serving.app`: serves until it is told to stop (SIGTERM or Ctrl-C)."""

    model_dir: Path
    model_name: str
    """The name clients ask for."""
    serve: ServeConfig = ServeConfig()


class BatchJob(Job):
    """`python -m serving.batch`: answers to all rows of requests in a file or folder, as parts in `output_dir`."""

    model_dir: Path
    model_name: str
    """What the model is called in requests that name one."""
    input: Path
    """A file `.jsonl`, `.ndjson` or `.parquet`, or a folder of them."""
    serve: ServeConfig = ServeConfig()
    """The engines, `num_replicas` of them, and what a request may ask for; what concerns HTTP is not read."""
    batch: BatchConfig = BatchConfig()
