"""Scorers of one's own: `package.module:function`, taking answer and expected text and giving 0 to 1.

They are imported and tried when a spec is read, so that a bad one is refused before anything starts, and their source is part of the
identity of what they score: an edited scorer scores again.
"""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from infra.errors import ConfigError
from infra.files import sha256_file

TRIED = (("", ""), ("yes", "yes"), ('{"a": 1}', "no"))
"""Answers and expected texts that any scorer must be able to score."""


def is_own(name: str) -> bool:
    """Whether a metric's name is a dotted path."""
    return ":" in name


def load_scorer(path: str) -> Callable[[str, str], float]:
    """The function at `package.module:function`, with each of its scores checked.

    Raises ConfigError where it cannot be imported, is no function of two texts, or gives something else than 0 to 1.
    """
    function = _found(path)

    def scorer(answer: str, expected: str) -> float:
        return _checked(path, function, answer, expected)

    for answer, expected in TRIED:
        scorer(answer, expected)
    return scorer


def source_digest(path: str) -> str:
    """sha256 of the file that the function is written in. Raises ConfigError like `load_scorer`."""
    found = _found(path)
    try:
        return sha256_file(Path(inspect.getfile(inspect.unwrap(found))))
    except (TypeError, OSError) as error:
        raise ConfigError(
            f"{path}: its source file cannot be read ({error}), so a change to it would go unseen. Write it in Python."
        ) from error


def _found(path: str) -> Any:
    module_name, _, function_name = path.partition(":")
    try:
        found = getattr(importlib.import_module(module_name), function_name)
    except Exception as error:  # whatever the import of somebody's module raises is a fault of the spec
        what = f"{type(error).__name__}: {error}"
        raise ConfigError(
            f"{path}: cannot be imported ({what}). A scorer is `package.module:function`, its folder on PYTHONPATH, as in "
            f"`my_scorers:close_enough`."
        ) from error
    if not callable(found):
        raise ConfigError(f"{path}: is a {type(found).__name__}; a function of answer and expected text is needed.")
    return found


def _checked(path: str, function: Callable[[str, str], Any], answer: str, expected: str) -> float:
    given = f"given answer {answer[:60]!r} and expected text {expected[:60]!r}"
    try:
        score = function(answer, expected)
    except Exception as error:  # a model may answer anything, so a scorer that can fail fails some day
        raise ConfigError(f"{path}: raises {type(error).__name__}: {error}, {given}. A scorer gives every text a score.") from error
    if not isinstance(score, (bool, int, float)) or not math.isfinite(score) or not 0 <= score <= 1:
        raise ConfigError(f"{path}: gives {score!r}, {given}. A number from 0 (wrong) to 1 (right) is needed.")
    return float(score)
