"""What a model is measured by, and what it must show before it is promoted: two parts of the spec."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from infra.config import Config
from infra.errors import ConfigError
from infra.evaluation.metrics import find_metric
from infra.evaluation.own_scorer import is_own
from infra.evaluation.scorers import SCORERS
from infra.evaluation.slices import SLICES_BY, SliceBy
from infra.evaluation.tasks import TasksConfig


class EvaluateConfig(Config):
    """How answers to the held-out rows are scored."""

    metrics: tuple[str, ...] = Field(("exact_match_json", "valid_json"), min_length=1)
    """Metrics by name, or a function of your own as `package.module:function`. The first decides: it must score each answer by itself."""
    max_new_tokens: int = Field(64, ge=1, le=8192)
    """Longest answer."""
    confidence: float = Field(0.95, gt=0.5, lt=1)
    """Level of the intervals."""
    slices: tuple[SliceBy, ...] = SLICES_BY
    """Slices beside those that rows name: by the tool of the expected call, by the prompt's length, by the row's `language`."""
    lm_eval: TasksConfig | None = None
    """Tasks of lm-evaluation-harness for the base, the merged model and each candidate for serving, which show what was forgotten; absent
    means none. Their figures are scores named `lm_eval.TASK.METRIC`. Needs the extra `lm-eval`, and the tasks' rows in the hub's cache."""
    latency_rows: int = Field(32, ge=1, le=10_000)
    """Held-out rows, spread over the split, that each candidate answers alone, where `latency_s` is a metric or `gates.max_latency_s` is
    asked; each costs a whole answer."""
    repeated_rows: int = Field(32, ge=0, le=100_000)
    """Rows that each served candidate answers a second time, which measures the noise of its figures; 0 means none."""

    @field_validator("metrics")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        problems = []
        for name in value:
            try:
                find_metric(name)
            except ConfigError as error:
                problems.append(error.message.rstrip("."))
        if len(set(value)) < len(value):
            problems.append(f"{list(value)} names a metric twice")
        if not problems and not is_own(value[0]) and value[0] not in SCORERS:
            problems.append(f"the first metric is {value[0]!r}, which is no score of one answer; first comes one of {', '.join(SCORERS)}")
        if problems:
            raise ValueError("; ".join(problems))
        return value


class MetricGate(Config):
    """What one metric must show; what is absent is not asked."""

    min: float | None = None
    """Least value of the served model."""
    max: float | None = None
    """Most, for metrics that are better when lower: `latency_s`, `perplexity`."""
    min_gain: float | None = None
    """Least that the served model must be better than the base."""
    max_loss: float | None = Field(None, ge=0)
    """Most that the served model may be worse than the adapter."""

    @model_validator(mode="after")
    def _asks_something(self) -> MetricGate:
        if (self.min, self.max, self.min_gain, self.max_loss) == (None, None, None, None):
            raise ValueError("asks nothing; give one of min, max, min_gain, max_loss")
        return self


class GatesConfig(Config):
    """What a model must show before it is promoted; where no metric is named, by the first."""

    min_score: float = Field(0.9, ge=0, le=1)
    """Least score of the model that will be served."""
    min_slice_scores: dict[str, float] = Field(default_factory=dict)
    """Least score by slice of the held-out rows: `seen_template`, `tool=HassTurnOn`, `length=long`, `language=de`."""
    min_worst_slice_score: float | None = Field(None, ge=0, le=1)
    """Least score of the slice that scores worst; absent means that it is not asked."""
    min_slice_rows: int = Field(20, ge=1)
    """Rows that a slice needs to count as the worst: of a few rows one wrong answer says little."""
    min_gain: float = Field(0.0, ge=-1, le=1)
    """Least gain of the served model over the base."""
    max_quantization_drop: float = Field(0.02, ge=0, le=1)
    """Most that quantization may cost against the adapter."""
    max_quantization_drops: dict[str, float] = Field(default_factory=dict)
    """The same by format, where one is given another margin: `{openvino-int4: 0.03}`."""
    margin_by: Literal["estimate", "interval"] = "estimate"
    """What must lie within the margins of a loss: `estimate`, the measured one; `interval`, all of its interval, which proves
    non-inferiority, and takes more rows."""
    metrics: dict[str, MetricGate] = Field(default_factory=dict)
    """Gates on further metrics, by name; each must be among `evaluate.metrics`."""
    max_task_loss: float | None = Field(None, ge=0)
    """Most that the served model may be worse than the base in any task of `evaluate.lm_eval`; the merged one, where none is served to do
    them (`evaluate.lm_eval.on_served`)."""
    max_latency_s: float | None = Field(None, gt=0)
    """Most seconds that one answer may take while the engine answers nothing else, on average of `evaluate.latency_rows` answers."""
    max_size_bytes: int | None = Field(None, ge=1)
    """Most bytes of the served model's folder."""
    max_lost_rows_share: float | None = Field(None, ge=0, le=1)
    """Most of the rows read that may have been dropped, of either split."""
    max_lost_tokens_share: float | None = Field(None, ge=0, le=1)
    """Most of the tokens read that may have been dropped, of either split."""
    min_merge_agreement: float = Field(0.99, ge=0, le=1)
    """Least share of rows that the merged model answers exactly as the adapter does."""

    def margin(self, model: str, metric: str, first_metric: str) -> float | None:
        """Most that `model` may lose against the adapter by `metric`; None where that is not asked."""
        if metric == first_metric:
            return self.max_quantization_drops.get(model, self.max_quantization_drop)
        gate = self.metrics.get(metric)
        return gate.max_loss if gate else None


def gate_problems(evaluate: EvaluateConfig, gates: GatesConfig) -> list[str]:
    """What the gates ask that is never measured."""
    problems = []
    if unknown := [name for name in gates.metrics if name not in evaluate.metrics]:
        problems.append(f"gates.metrics names {unknown}, evaluate.metrics are {list(evaluate.metrics)}. Add them there")
    if gates.max_task_loss is not None and evaluate.lm_eval is None:
        problems.append("gates.max_task_loss asks for tasks, evaluate.lm_eval names none. Name some")
    return problems
