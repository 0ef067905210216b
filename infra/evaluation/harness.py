"""Tasks of lm-evaluation-harness, put to any model that the harness can ask; each stack brings its own.

What a task needs from the hub must lie in its cache already, for programs run offline; a task of one's own brings its rows as files.
The harness is imported only where it is asked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from infra.errors import ConfigError
from infra.evaluation.tasks import TaskFigure, TasksConfig, task_key

BOOTSTRAP_DRAWS = 1000  # of the figures that are no means; the harness's own default takes minutes


def open_tasks(config: TasksConfig) -> Any:
    """The harness's table of tasks. Raises ConfigError for a task that it does not have."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(config.folder) if config.folder else None)
    if unknown := [name for name in config.names if name not in manager.all_tasks]:
        raise ConfigError(f"evaluate.lm_eval.names: the harness has no {', '.join(unknown)}. `lm-eval ls tasks` lists those it has.")
    return manager


def task_figures(model: Any, config: TasksConfig, manager: Any, report: Callable[[int, int], None]) -> dict[str, Any]:
    """Every figure of every task by our name for it; `report` is told how many of how many tasks are done.

    Raises ConfigError for a task whose rows cannot be read.
    """
    found: dict[str, Any] = {}
    for number, name in enumerate(config.names, start=1):
        found |= _figures(_evaluated(model, name, manager, config.limit_rows))
        report(number, len(config.names))
    return found


def _evaluated(model: Any, name: str, manager: Any, limit_rows: int | None) -> dict[str, Any]:
    from lm_eval import simple_evaluate

    given = {"limit": limit_rows, "task_manager": manager, "bootstrap_iters": BOOTSTRAP_DRAWS, "log_samples": False}
    try:
        return dict(simple_evaluate(model=model, tasks=[name], **given))
    except (OSError, ValueError) as error:  # how `datasets` says that rows are not there
        raise ConfigError(
            f"evaluate.lm_eval: the rows of {name!r} cannot be read: {error}. Load them into the hub's cache first."
        ) from error


def _figures(results: dict[str, Any]) -> dict[str, Any]:
    found = {}
    for task, values in results["results"].items():
        for name, value in values.items():
            metric, _, kind = name.partition(",")
            if metric.endswith("_stderr") or not isinstance(value, (int, float)) or not kind:
                continue
            error = values.get(f"{metric}_stderr,{kind}")
            figure = TaskFigure(
                value=value,
                stderr=error if isinstance(error, (int, float)) else None,
                n=results["n-samples"][task]["effective"],
                is_better_higher=results["higher_is_better"][task].get(metric, True) is not False,
            )
            found[task_key(task, metric, kind)] = figure.model_dump(mode="json")
    return found
