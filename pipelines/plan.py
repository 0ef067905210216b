"""The graph that one spec describes."""

from __future__ import annotations

from infra.errors import ConfigError
from pipelines import graph
from pipelines.spec import Spec
from pipelines.step import Step
from pipelines.steps import base, evaluate, export, gate, merge, predict, prove, quantize, render, repeat, rows, tasks, train


def build_steps(spec: Spec) -> list[Step]:
    """Every step from dataset to gates, in order. Raises one ConfigError with all that is wrong with the sources."""
    steps: list[Step] = []
    problems: list[str] = []
    merging = [merge.step] if spec.merged_by == "merge" else []
    for make in (rows.step, base.step, render.step, train.step, *merging):
        try:
            steps.append(make(spec))
        except ConfigError as error:
            problems.append(error.message)
    if problems:
        raise ConfigError("\n".join(problems))
    steps += [*export.steps(spec), *quantize.steps(spec), *predict.steps(spec), *repeat.steps(spec), *tasks.steps(spec)]
    steps += [evaluate.step(spec), prove.step(spec), gate.step(spec)]
    return graph.ordered(steps)
