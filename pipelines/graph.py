"""Checks a set of steps before any of them runs, and puts them in order."""

from __future__ import annotations

from collections.abc import Sequence
from graphlib import CycleError, TopologicalSorter

from infra.errors import ConfigError
from pipelines.step import Step


def ordered(steps: Sequence[Step]) -> list[Step]:
    """The steps, each after all that it needs; ties keep their given order.

    Raises ConfigError listing every unknown input, type mismatch and duplicate name, or the cycle.
    """
    by_name = {step.name: step for step in steps}
    problems = _problems(steps, by_name)
    if problems:
        raise ConfigError(f"the steps do not fit together, {len(problems)} problem(s):\n" + "\n".join(f"  - {line}" for line in problems))
    sorter = TopologicalSorter({step.name: step.needs.keys() for step in steps})
    try:
        sorter.prepare()
    except CycleError as error:
        raise ConfigError(f"the steps need each other in a circle: {' -> '.join(error.args[1])}. Remove one of these needs.") from error
    result: list[Step] = []
    position = {step.name: index for index, step in enumerate(steps)}
    while sorter.is_active():
        ready = sorted(sorter.get_ready(), key=position.__getitem__)
        result.extend(by_name[name] for name in ready)
        sorter.done(*ready)
    return result


def upto(steps: Sequence[Step], name: str) -> list[Step]:
    """Those of the ordered `steps` that `name` depends on, and `name` itself last."""
    by_name = {step.name: step for step in steps}
    wanted: set[str] = set()
    pending = [name]
    while pending:
        current = pending.pop()
        if current not in wanted:
            wanted.add(current)
            pending.extend(by_name[current].needs)
    return [step for step in steps if step.name in wanted]


def _problems(steps: Sequence[Step], by_name: dict[str, Step]) -> list[str]:
    problems = [f"two steps are called {name!r}" for name in by_name if sum(step.name == name for step in steps) > 1]
    for step in steps:
        for needed, kind in step.needs.items():
            if needed not in by_name:
                problems.append(f"{step.label} needs {needed!r}, which no step makes; there are {sorted(by_name)}")
            elif by_name[needed].produces != kind:
                problems.append(f"{step.label} needs {needed!r} to make {kind!r}, but it makes {by_name[needed].produces!r}")
    return problems
