"""The whole values of helm/training: Kubernetes' part, and the spec that the pipeline runs."""

from __future__ import annotations

from typing import Self

from pydantic import model_validator

from pipelines.spec import Spec
from training.chart import TrainingChart


class Values(TrainingChart):
    """The values of helm/training."""

    config: Spec | None = None
    """The spec, as `slipway run` reads it from a file. Needed where the pipeline is enabled or scheduled."""

    @model_validator(mode="after")
    def _pipeline_has_a_spec(self) -> Self:
        if (self.pipeline.enabled or self.pipeline.schedule) and self.config is None:
            raise ValueError("config is absent, and the pipeline runs it. Put the whole spec under the key `config` of a values file.")
        return self
