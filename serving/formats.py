"""The forms in which a merged model can be served, the spec's choice among them, and the programs' jobs; light, for the driver reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

from pydantic import Field, model_validator

from infra.config import Config
from infra.contracts import WeightFacts
from infra.process import Job

WeightFormat = Literal["openvino-int8", "openvino-int4", "openvino-int4-awq", "bf16", "bnb-int8", "bnb-nf4", "vllm-bf16"]
WEIGHT_FORMATS: tuple[WeightFormat, ...] = get_args(WeightFormat)
CHEAPEST = "cheapest"
INT4_FORMATS = ("openvino-int4", "openvino-int4-awq")
DATA_AWARE_FORMATS = ("openvino-int4-awq",)
MODES_OF_FORMAT: dict[WeightFormat, tuple[str, ...]] = {
    "openvino-int8": ("int8_asym",),
    "openvino-int4": ("int4_asym",),
    "openvino-int4-awq": ("int4_asym",),
    "bf16": ("f16",),
    "bnb-int8": ("int8_sym",),
    "bnb-nf4": ("nf4",),
    "vllm-bf16": ("bf16", "f16"),
}
"""What the files of a format say that most of their numbers are."""


class FormatConfig(Config):
    """One weight format with all that decides its weights; what does not concern a format is absent."""

    format: WeightFormat = "openvino-int8"
    group_size: int | None = None
    """Numbers of a row that share one scale."""
    int4_share: float | None = None
    """Share of the layers' weights in 4 bits; the rest has 8."""
    calibration_rows: int | None = None
    """Training rows whose activations are looked at."""


class QuantizeConfig(Config):
    """How the merged model is made small for its engine: the formats that are tried, and which of them is served."""

    formats: tuple[WeightFormat, ...] = Field(("openvino-int8",), min_length=1)
    """Candidates; each is made, scored and timed, and names its model in scores and gates. `bf16` and `vllm-bf16` keep the 16 bits of the
    merged weights. A format is served by the engine in its name: the `bnb` ones by `torch`, and `bf16`, like the rest, by `openvino`."""
    choose: Literal["cheapest"] | WeightFormat = "cheapest"
    """Which candidate goes on: `cheapest` is the smallest on disk that passes the gates; among those within 5% of it the fastest, and among
    those within 10% of that the one with the best score. Or the name of a candidate, which then must pass."""
    group_size: int = Field(64, ge=16, le=1024)
    """For 4 bits: numbers of a row that share one scale. It must divide the model's sizes; a smaller one costs bytes and loses less."""
    int4_share: float = Field(0.8, gt=0, le=1)
    """For 4 bits: share of the layers' weights that get them; the rest, the most sensitive, gets 8, like embeddings and output.
    Of 300 smart-home rows (135M) 16 bits score 0.990; without data 0.973 with all and 0.977 with 0.8 of them, looking at data 0.980 and
    0.990, for 95 and 105 MB."""
    calibration_rows: int = Field(64, ge=8, le=4096)
    """For `openvino-int4-awq`: training rows, spread over the split, whose activations decide scales."""

    @model_validator(mode="after")
    def _check_formats(self) -> QuantizeConfig:
        if len(set(self.formats)) < len(self.formats):
            raise ValueError(f"formats {list(self.formats)} names one twice. Name each once.")
        if self.choose not in (CHEAPEST, *self.formats):
            raise ValueError(f"choose is {self.choose!r}, formats are {list(self.formats)}. Choose one of them, or {CHEAPEST!r}.")
        return self

    def of(self, weight_format: WeightFormat) -> FormatConfig:
        """What decides the weights of one candidate."""
        is_int4 = weight_format in INT4_FORMATS
        return FormatConfig(
            format=weight_format,
            group_size=self.group_size if is_int4 else None,
            int4_share=self.int4_share if is_int4 else None,
            calibration_rows=self.calibration_rows if weight_format in DATA_AWARE_FORMATS else None,
        )


class ExportJob(Job):
    """`python -m serving.quantize.export`: the merged model as OpenVINO reads it, weights still whole."""

    merged_dir: Path


class QuantizeJob(Job):
    """`python -m serving.quantize.openvino`, `.bnb` or `.vllm`: the merged model in the engine's weight format."""

    merged_dir: Path
    quantize: FormatConfig = FormatConfig()
    exported_dir: Path | None = None
    """For OpenVINO: the export to start from; absent means one that is made for this job alone."""
    tokens_dir: Path | None = None
    """Training rows as token ids, for formats that look at activations."""


def weight_problems(found: WeightFacts, asked: FormatConfig) -> list[str]:
    """How the weights of a model differ from what its format means; empty where they are as asked."""
    problems = []
    if found.mode not in MODES_OF_FORMAT[asked.format]:
        problems.append(f"weights are {found.mode}, {' or '.join(MODES_OF_FORMAT[asked.format])} is needed")
    if asked.group_size is not None and found.group_size != asked.group_size:
        problems.append(f"weights stand in groups of {found.group_size}, {asked.group_size} is needed")
    if asked.calibration_rows is not None and found.calibration_rows is None:
        problems.append("no training rows were looked at")
    return problems
