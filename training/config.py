"""What can be said about training; light, so that the driver can check a spec without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from infra.config import Config
from infra.process import Job

# Models whose forward is decoder, then one plain head, with rotary positions and causal attention in every layer.
KNOWN_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")


class LoraConfig(Config):
    """Low-rank adapters (Hu et al. 2021, arXiv 2106.09685)."""

    rank: int = Field(16, ge=1, le=512)
    """Rank of the update B A."""
    alpha: float = Field(32.0, gt=0)
    """The update is scaled by alpha / rank."""
    use_dora: bool = False
    """Learn the size of each output apart from its direction (Liu et al. 2024, arXiv 2402.09353); slower, sometimes better at low rank."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(rank) instead, so that a high rank does not fade (Kalajdzievski 2023, arXiv 2312.03732)."""
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    """Dropout on the adapter's input."""
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Names of the linear layers that get an adapter."""


def _kind_of_workers(value: Any) -> str:
    return "range" if isinstance(value, (list, tuple)) else "number"


WorkerCount = Annotated[int, Field(ge=1, le=4096)]
Workers = Annotated[  # told apart first, so that a bad value is answered with one problem and not with one for each kind
    Annotated[WorkerCount, Tag("number")] | Annotated[tuple[WorkerCount, WorkerCount], Tag("range")], Discriminator(_kind_of_workers)
]


class ParallelConfig(Config):
    """How one copy of the model is laid over workers. The copies, num_workers divided by the product of these, share the rows."""

    shard: int = Field(1, ge=1)
    """Workers over which weights, gradients and optimizer state are sharded, each layer whole only while it computes (FSDP2)."""
    tensor: int = Field(1, ge=1)
    """Workers over which every matrix is cut; they should share a machine."""
    pipeline: int = Field(1, ge=1)
    """Stages that hold consecutive layers; give them several micro-batches a step."""

    @property
    def workers_per_copy(self) -> int:
        """Workers that hold one copy of the model together."""
        return self.pipeline * self.shard * self.tensor


class TrainConfig(Config):
    """One fine-tuning run."""

    method: Literal["lora", "full"] = "lora"
    """`lora` trains adapters on a frozen base; `full` trains every weight, with about 16 bytes of memory a parameter."""
    lora: LoraConfig = LoraConfig()
    base_quantization: Literal["none", "nf4", "int8"] = "none"
    """Storage of the frozen base while adapters are trained (QLoRA): NF4 with double quantization or rows of INT8, by bitsandbytes.
    Whatever is chosen, the adapter is merged into the 16-bit base."""
    gradient_checkpointing: bool = False
    """Keep one activation a layer and compute the others again in the backward pass: a third more time for much less memory."""
    epochs: float = Field(2.0, gt=0, le=1000)
    """Passes over the training rows; a fraction stops part-way."""
    max_steps: int | None = Field(None, ge=1)
    """Optimizer steps at most, whatever the epochs say."""
    batch_rows: int = Field(16, ge=1, le=65536)
    """Rows of one optimizer step, over all workers."""
    micro_batch_rows: int = Field(16, ge=1, le=65536)
    """Rows of one forward and backward pass on one worker; gradients accumulate up to `batch_rows`."""
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "lion", "adafactor", "sgd"] = "adamw"
    """Bytes of state a trained parameter: adamw 8, adamw_8bit 2, lion 4, adafactor about none, sgd (momentum 0.9) 4; paged ones may move it
    to the host when a GPU is full. Lion wants a learning rate three to ten times lower than AdamW."""
    learning_rate: float = Field(1e-3, gt=0, lt=1)
    warmup_share: float = Field(0.05, ge=0, lt=1)
    """Share of the steps over which the learning rate rises from zero."""
    schedule: Literal["constant", "linear", "cosine", "warmup_stable_decay"] = "cosine"
    """The learning rate after the warm-up; `warmup_stable_decay` stays at the peak and falls at the end (arXiv 2405.18392)."""
    final_learning_rate_share: float = Field(0.0, ge=0, le=1)
    """Where the fall ends, as a share of the peak."""
    decay_share: float = Field(0.2, gt=0, le=1)
    """Share of the steps, at the end, over which `warmup_stable_decay` falls."""
    weight_decay: float = Field(0.0, ge=0)
    max_gradient_norm: float = Field(1.0, gt=0)
    """Gradients are scaled down to this norm."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Arithmetic of forward and backward; optimizer state and master weights are fp32 either way. `auto` takes bf16 where the processor has
    instructions for it, else fp32, which is then ten times faster. fp16, for GPUs without bf16, scales the loss against underflow."""
    num_workers: Workers = Field(1, json_schema_extra={"identity": False})
    """Ray Train workers: a number, or `[min, max]`. With two, training begins on as many as there is room for, goes on from the last
    checkpoint with fewer when a node is lost, and with more when one comes."""
    parallel: ParallelConfig = Field(ParallelConfig(), json_schema_extra={"identity": False})
    """How the workers share the model."""
    cpus_per_worker: int | None = Field(None, ge=1, json_schema_extra={"identity": False})
    """Cores of one worker; absent means this machine's cores shared among the workers."""
    checkpoint_steps: int = Field(50, ge=1, json_schema_extra={"identity": False})
    """A checkpoint every so many optimizer steps."""
    keep_checkpoints: int = Field(2, ge=1, json_schema_extra={"identity": False})
    """How many of the newest are kept while training."""
    checkpoint_url: str | None = Field(None, json_schema_extra={"identity": False})
    """Folder or fsspec URL (s3://, gs://, ...) that every worker reaches; absent means beside the step's own output."""
    keep_best: bool = False
    """End with the weights of the lowest held-out loss instead of the last ones; while training, that step's checkpoint stays beside the
    newest."""
    max_failures: int = Field(2, ge=0, json_schema_extra={"identity": False})
    """How often a lost worker may restart the run from its last checkpoint."""
    eval_steps: int = Field(50, ge=1)
    """Held-out loss every so many steps."""
    eval_rows: int = Field(64, ge=0)
    """Held-out rows used for that loss."""
    sample_rows: int = Field(3, ge=0, le=64, json_schema_extra={"identity": False})
    """Held-out prompts answered at each of these losses, as a table in MLflow."""
    early_stop_evals: int | None = Field(None, ge=1)
    """Stop once so many held-out losses in a row were no new lowest, and keep the adapter of the lowest; absent means never."""
    log_steps: int = Field(5, ge=1, json_schema_extra={"identity": False})
    """Metrics every so many steps."""
    seed: int = Field(0, ge=0)

    @property
    def min_workers(self) -> int:
        """The fewest workers that training goes on with."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def max_workers(self) -> int:
        """The most workers that it uses."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]

    @model_validator(mode="after")
    def _settings_fit_together(self) -> Self:
        problems = []
        if (self.early_stop_evals or self.keep_best) and not self.eval_rows:
            problems.append("early_stop_evals and keep_best need held-out losses, and eval_rows is 0. Raise eval_rows or leave them out.")
        if self.method == "full" and self.base_quantization != "none":
            problems.append(
                f"base_quantization {self.base_quantization!r} freezes the base method 'full' trains. Choose 'none', or method 'lora'."
            )
        problems += self._worker_problems()
        sizes = self.parallel
        if self.base_quantization != "none" and sizes.shard * sizes.tensor > 1:
            problems.append("a quantized base cannot be cut: set parallel.shard and parallel.tensor to 1, or base_quantization to 'none'.")
        if self.lora.use_dora and sizes.shard * sizes.tensor > 1:
            problems.append("lora.use_dora needs whole matrices: set parallel.shard and parallel.tensor to 1, or use_dora to false.")
        if problems:
            raise ValueError(" ".join(problems))
        return self

    def _worker_problems(self) -> list[str]:
        sizes, per_copy = self.parallel, self.parallel.workers_per_copy
        product = f"{per_copy} = parallel.pipeline {sizes.pipeline} x shard {sizes.shard} x tensor {sizes.tensor}"
        if self.min_workers > self.max_workers:
            return [f"num_workers [{self.min_workers}, {self.max_workers}] has its larger number first. Write [min, max]."]
        if per_copy > 1 and self.min_workers < self.max_workers:
            return [
                f"num_workers [{self.min_workers}, {self.max_workers}] may become a number that is no multiple of {product}. "
                "Give one number of workers, or set parallel to 1."
            ]
        if self.max_workers % per_copy:
            return [f"num_workers {self.max_workers} is no multiple of {product}. Change one of them."]
        return []


RowFormat = Literal["auto", "messages", "prompt_completion", "alpaca", "sharegpt", "text"]


class DataSource(Config):
    """Rows of one kind from one place."""

    path: str = Field(json_schema_extra={"travels": "dataset"})
    """A .jsonl, .json, .csv or .parquet file, a folder of them, a folder made by `save_to_disk`, or `hf:OWNER/NAME[@REVISION]`."""
    weight: float | None = Field(None, gt=0)
    """Share of this source in the mix, relative to the others: the mix is as large as it can be without repeating a row. Without
    weights every row of every source is used."""
    format: RowFormat = "auto"
    """Shape of its rows."""
    split: str = "train"
    """Which split, where a folder holds several."""


def _as_sources(value: Any) -> Any:
    """A path alone, or one source alone, is a list of one."""
    many = list(value) if isinstance(value, (list, tuple)) else [value]
    return [{"path": str(each)} if isinstance(each, (str, Path)) else each for each in many]


_OneSource = str | DataSource  # what may be written, for the JSON schema
_as_written = BeforeValidator(_as_sources, json_schema_input_type=_OneSource | Annotated[list[_OneSource], Field(min_length=1)])
DataSources = Annotated[tuple[DataSource, ...], Field(min_length=1), _as_written]


class DataConfig(Config):
    """How rows become tokens."""

    format: RowFormat = "auto"
    """Shape of a row, for sources that name none; `auto` looks at the first row and says what it found."""
    max_tokens: int | None = Field(None, ge=8)
    """Longest row; absent means the base model's context."""
    max_lost_share: float = Field(0.02, ge=0, le=1)
    """Share of rows that may be dropped before the run is refused."""
    num_workers: int | None = Field(None, ge=1, le=4096, json_schema_extra={"identity": False})
    """Processes that render rows as tokens, by Ray Data where there are several; absent means one for a dataset of less than 64 MB, which
    it renders in the time that Ray takes to start, else one a core. Tokens and receipt do not depend on it."""


class RowsJob(Job):
    """`python -m training.data.rows`: a user's dataset as checked train.jsonl and heldout.jsonl, every row messages or a text."""

    train: DataSources
    """Where the training rows are."""
    heldout: DataSources | None = None
    """Where the held-out rows are; absent means a seeded part of the training rows is held out."""
    heldout_share: float = Field(0.1, gt=0, lt=1)
    seed: int = Field(0, ge=0)
    data: DataConfig = DataConfig()


class BaseJob(Job):
    """`python -m training.base`: a base model as a checked folder of safetensors."""

    source: str = Field(json_schema_extra={"travels": "model"})
    """`file:`, `package:` or `hf:` source, see infra/models.py."""


class RenderJob(Job):
    """`python -m training.data.render`: rows as token ids and labels, with the receipt."""

    base_dir: Path
    rows_dir: Path
    """Folder with train.jsonl and heldout.jsonl."""
    data: DataConfig = DataConfig()
    train_limit_rows: int | None = Field(None, ge=1)
    """Only the first so many training rows; absent means all."""


class FinetuneJob(Job):
    """`python -m training.finetune`: a LoRA adapter."""

    base_dir: Path
    tokens_dir: Path
    train: TrainConfig = TrainConfig()


class EstimateJob(FinetuneJob):
    """`python -m training.estimate`: what a FinetuneJob would need; nothing is trained."""

    measured_steps: int = Field(3, ge=1, le=100)
    """Optimizer steps that are timed."""


class MergeJob(Job):
    """`python -m training.merge`: base and adapter as one 16-bit model."""

    base_dir: Path
    adapter_dir: Path


class PredictJob(Job):
    """`python -m training.predict`: greedy answers of one model to the held-out prompts."""

    model_dir: Path
    """Folder of the base or merged model."""
    adapter_dir: Path | None = None
    """Adapter to put on it, if any."""
    tokens_dir: Path
    max_new_tokens: int = Field(96, ge=1)
    score_expected: bool = False
    """Whether it is also computed how likely the expected answers are, for the perplexity."""
    batch_rows: int = Field(64, ge=1)
    precision: Literal["auto", "bf16", "fp32"] = "fp32"
    """Arithmetic. In fp32 two models differ in their answers only where their weights do; bf16 adds roundings of its own."""
    limit_rows: int | None = Field(None, ge=1)
    """Only the first so many held-out rows; absent means all."""


class ScoreJob(Job):
    """`python -m training.score`: what base, trained and merged model make of the same chats, and whether the merge is right."""

    base_dir: Path
    adapter_dir: Path | None = None
    """Absent where training made the whole model."""
    merged_dir: Path
    tokens_dir: Path
    rows_dir: Path
    """The rows that the tokens were rendered from."""
    cases_dir: Path
    max_new_tokens: int = Field(32, ge=1)
    """Longest answer to a chat that no model has answered yet."""
    audited_rows: int = Field(64, ge=1)
    """Training rows that are rendered again."""
    audited_gb: float = Field(4.0, gt=0)
    """Weights, in GB, that are merged again; a seeded part of the tensors where there are more."""
    seed: int = 0
