"""What can be said about serving; light, so that the driver can check a spec without an engine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from infra.config import Config
from infra.process import Job

APPLICATION_NAME = "slipway"
DEPLOYMENT_NAME = "model"
"""Ray Serve's names for the one model and all that serves it."""
EngineName = Literal["openvino", "torch", "vllm"]
Precision = Literal["auto", "f32", "bf16"]
SpeculationKind = Literal["prompt_lookup", "draft"]
EngineWeights = Literal["full", "int8", "nf4"]
BatchFormat = Literal["jsonl", "parquet"]
BATCH_MANIFEST_NAME = "_batch.json"
"""In the folder of a batch's answers: what it is, and its result once it is complete."""
AdapterName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


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


class SpeculativeConfig(Config):
    """Tokens guessed ahead, and checked together in the step that makes the next one, wherever that proves faster.

    Each load is measured with guesses and without; the faster way stays, and the other is tried again now and then.
    """

    kind: SpeculationKind = "prompt_lookup"
    """Where guesses come from: `prompt_lookup` repeats what followed the last tokens where they stood before, in prompt or answer; `draft`
    asks a small model."""
    draft_model_dir: Path | None = None
    """Folder of the small model, in the form that the engine reads, with the tokenizer of the model itself; for `draft` only."""
    num_tokens: int = Field(3, ge=1, le=32)
    """Tokens guessed at most in a step."""
    max_ngram_size: int = Field(3, ge=1, le=32)
    """Last tokens that are looked up together at most; fewer where so many were never there before."""
    max_requests: int = Field(4, ge=1, le=4096)
    """Requests at once above which there are no guesses, however good. With 3 guesses at every step two cores (`openvino`, 135M) make
    2.2, 1.5, 1.1, 0.8, 0.9 times the tokens/s at 1, 2, 4, 8, 16 requests that repeat the prompt, and 0.8, 0.7, 0.6, 0.3, 0.7 at others."""
    min_acceptance: float = Field(0.1, ge=0, lt=1)
    """Share of guessed tokens that must be right; with fewer, guessing stops and is tried again later."""

    @model_validator(mode="after")
    def _check_draft(self) -> SpeculativeConfig:
        if self.kind == "draft" and self.draft_model_dir is None:
            raise ValueError("kind is 'draft' and draft_model_dir absent. Name the small model's folder, or use 'prompt_lookup'.")
        if self.kind != "draft" and self.draft_model_dir is not None:
            raise ValueError(f"draft_model_dir is given and kind is {self.kind!r}. Set kind to 'draft', or leave the folder out.")
        return self


class PoolConfig(Config):
    """Replicas of one kind. What is absent is as the server has it."""

    name: str = Field(pattern=r"^[a-z][a-z0-9-]{0,30}$")
    accelerator: Literal["cpu", "gpu"] = "cpu"
    """Where its engine computes: with `gpu` each replica gets one."""
    engine: EngineName | None = None
    engine_python: Path | None = Field(None, json_schema_extra={"travels": "stays"})
    weights: EngineWeights | None = None
    model_dir: Path | None = None
    """Folder of the model in the form that the pool's engine reads; absent means the one that the server was given."""
    num_replicas: int = Field(1, ge=1, le=1000)
    autoscale: AutoscaleConfig | None = None
    cpus_per_replica: int | None = Field(None, ge=1)
    max_running_requests: int | None = Field(None, ge=1, le=4096)
    usd_per_hour: float = Field(0.0, ge=0)
    """Price of one replica. Requests go to the pool whose places are cheapest, as long as it answers in time."""


class ServeConfig(Config):
    """One model behind the OpenAI API."""

    engine: EngineName = Field("openvino", json_schema_extra={"chart": "absent"})
    """What computes: `openvino` reads what was quantized for it (CPU); `vllm` and the reference, `torch`, read the merged model (CPU or
    GPU), and `torch` what bitsandbytes quantized. A spec, command or chart without it gets the engine that reads the model's weights."""
    engine_python: Path | None = Field(None, json_schema_extra={"travels": "stays"})
    """The Python that runs the engine's process, and has its library and this package; absent means the server's own, or where that lacks
    the library `.venv-ENGINE/bin/python` beside its venv."""
    weights: EngineWeights = "full"
    """How `torch` holds the weights: as they are, or by bitsandbytes in 8 bits or in NF4. The other engines serve what they are given."""
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = Field(8000, ge=1, le=65535)
    num_replicas: int = Field(1, ge=1, le=1000)
    """Replicas; with `autoscale`, those to begin with, as far as its bounds allow."""
    autoscale: AutoscaleConfig | None = None
    """How the number of replicas follows the load; absent means that it stays."""
    cpus_per_replica: int | None = Field(None, ge=1)
    """Cores of one replica; absent means this machine's cores shared among the most replicas that there can be."""
    gpus_per_replica: int = Field(0, ge=0, le=1)
    """GPUs of one replica, which sees no others: 1 for `vllm` or `torch` on a GPU. A model over several GPUs is not served yet."""
    pools: tuple[PoolConfig, ...] = ()
    """Several kinds of replicas behind one address; absent means one kind, as the other fields say."""
    adapters: dict[AdapterName, Path] = Field(default_factory=dict)
    """LoRA adapters beside the model, folders by name; clients ask for NAME or for MODEL:NAME. The model must be the very base that they
    were trained on, for `openvino` quantized, with no adapter merged into it."""
    max_adapters: int = Field(4, ge=1, le=256)
    """Adapters that one replica holds in memory at once; the one not asked for longest makes room. One that is not held is loaded when it
    is asked for. With `openvino` each takes the memory of a model of its own, and model and adapters share `cache_gb` evenly."""
    target_ttft_s: float = Field(1.0, gt=0)
    """Time to the first token above which requests go to a dearer pool."""
    max_running_requests: int = Field(64, ge=1, le=4096)
    """Requests one replica decodes together."""
    max_queued_requests: int = Field(256, ge=0)
    """Requests that may wait at one replica; further ones are answered 429 with Retry-After."""
    request_timeout_s: float = Field(600.0, gt=0, le=86_400)
    """Longest time from a request to the end of its answer; then 504, or an error event in a stream. A request may ask for less in
    the header `X-Request-Timeout-S`."""
    stream_interval_s: float = Field(0.016, ge=0, le=1)
    """Tokens of a stream that are made within this time go out together, at most one event for each picture that a screen shows; a first
    token goes at once. Sending takes cores from the engine: with 0 one stream on two cores made 0.91 of the tokens/s (135M)."""
    max_tokens_limit: int = Field(2048, ge=1)
    """Most new tokens one request may ask for."""
    default_max_tokens: int = Field(256, ge=1)
    """New tokens where a request does not say."""
    precision: Precision = "f32"
    """What `openvino` calculates in beside its 8-bit products; `auto` is bf16 where the processor has it. On AMX `f32` makes 1.3
    times the tokens/s of `auto` at one request and at 16, 1.1 times at 32 and as many at 64; answers depend less on others."""
    cache_gb: float = Field(1, ge=0.01, le=10_000)
    """Memory of the KV cache of one replica, in GB (2^30 bytes); taken as it fills."""
    speculative: SpeculativeConfig | None = None
    """Guesses of coming tokens that are checked together; absent means none. `openvino` holds the model twice for it, keeps a quarter of
    the cache for requests with guesses, and has none while a request has a grammar, a seed, or a frequency or presence penalty."""
    max_body_bytes: int = Field(1 << 20, ge=1024)
    """Largest request body."""
    api_keys_file: Path | None = None
    """File that `slipway keys` writes; with it every request needs `Authorization: Bearer KEY`. Changes count within a second."""
    allow_unsigned: tuple[AdapterName, ...] = ()
    """Names of models and adapters that are served without a signature of a trusted key. Every other one must have been signed, which
    `slipway run` does when it promotes a model, and `slipway sign FOLDER` at your word."""
    trusted_keys_file: Path | None = None
    """Public keys whose signatures count, one after the other in PEM; absent means the key of this machine's home folder."""
    open_paths: tuple[Literal["/health", "/metrics"], ...] = ("/health", "/metrics")
    """Paths that need no key all the same; `[]` closes them too. Probes of Kubernetes can send no key."""
    log_prompts: bool = False
    """Whether the request log (`requests-REPLICA.jsonl` beside the server's own) holds what was asked, prompts and all."""
    start_timeout_s: float = Field(120.0, gt=0)
    """How long start-up may take before it counts as failed."""
    drain_timeout_s: float = Field(10.0, ge=0)
    """How long running requests may finish after a stop signal."""

    @model_validator(mode="after")
    def _check_pools(self) -> ServeConfig:
        names = [pool.name for pool in self.pools]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"several pools are named {', '.join(twice)}. Give each a name of its own.")
        return self

    def of_pool(self, pool: PoolConfig) -> ServeConfig:
        """The settings of one pool's replicas."""
        own = ("engine", "weights", "num_replicas", "cpus_per_replica", "max_running_requests")
        given = {name: getattr(pool, name) for name in own}
        is_same_engine = pool.engine in (None, self.engine)  # another engine's Python is of no use
        own_only = {
            "autoscale": pool.autoscale,
            "engine_python": pool.engine_python or (self.engine_python if is_same_engine else None),
            "gpus_per_replica": int(pool.accelerator == "gpu"),
            "pools": (),
        }
        return self.model_copy(update={**{name: value for name, value in given.items() if value is not None}, **own_only})

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


class BatchConfig(Config):
    """How `slipway batch` reads rows of requests and writes their answers."""

    format: BatchFormat | None = None
    """Format of the answers; absent means that of the requests."""
    rows_per_part: int = Field(128, ge=1, le=100_000)
    """Rows of one file of answers, which is written whole or not at all; a kill costs each engine the few parts that it was answering."""
    ignored_fields: tuple[str, ...] = ()
    """Fields of a row that are no part of its request, labels for example; any other that is not known makes the row an error."""


class PredictJob(Job):
    """`python -m serving.predict`: the engine's greedy answers to the held-out prompts."""

    model_dir: Path
    tokens_dir: Path
    max_new_tokens: int = Field(96, ge=1)
    score_expected: bool = False
    """Whether it is also computed how likely the expected answers are, for the perplexity."""
    limit_rows: int | None = Field(None, ge=1)
    serve: ServeConfig = ServeConfig()
    """The engine, and what it may use."""
    timed_streams: tuple[int, ...] = ()
    """Numbers of requests at once at which the engine is timed; its figures go to `speed.json`."""
    latency_rows: int = Field(0, ge=0)
    """Rows, spread over the prompts, whose answers are timed alone; their seconds go to the answers."""


class ScoreJob(Job):
    """`python -m serving.score`: what a model makes of chats on which the stages are compared, run by the engine's library."""

    model_dir: Path
    cases_dir: Path
    reference_file: Path
    """What the trained model made of the same chats."""
    serve: ServeConfig = ServeConfig()
    """The engine, and what it may use."""


class AnswerJob(Job):
    """A model that answers requests by its name, and adapters beside it by theirs."""

    model_dir: Path
    model_name: str
    """What the model is called in requests."""
    serve: ServeConfig = ServeConfig()

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        if self.model_name in self.serve.adapters:
            raise ValueError(f"the model and one of serve.adapters are both named {self.model_name!r}. Give the adapter another name.")
        return self


class ServeJob(AnswerJob):
    """`python -m serving.app`: serves until it is told to stop (SIGTERM or Ctrl-C)."""

    pool: PoolConfig | None = None
    """The pool that this job is one of; set by the server itself."""

    @property
    def pool_name(self) -> str:
        """Empty where there are no pools."""
        return self.pool.name if self.pool else ""

    @property
    def application_name(self) -> str:
        """Ray Serve's name for the replicas of this job."""
        return f"{APPLICATION_NAME}-{self.pool.name}" if self.pool else APPLICATION_NAME

    @property
    def per_pool(self) -> tuple[ServeJob, ...]:
        """One job a pool; this one itself where there are no pools."""
        return tuple(
            self.model_copy(update={"serve": self.serve.of_pool(pool), "model_dir": pool.model_dir or self.model_dir, "pool": pool})
            for pool in self.serve.pools
        ) or (self,)


class BatchJob(AnswerJob):
    """`python -m serving.batch`: answers to all rows of requests in a file or folder, as parts in `output_dir`."""

    input: Path
    """A file `.jsonl`, `.ndjson` or `.parquet`, or a folder of them."""
    serve: ServeConfig = ServeConfig()
    """The engines, as many as there can be replicas, and what a request may ask for; what concerns HTTP is not read."""
    batch: BatchConfig = BatchConfig()
