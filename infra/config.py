"""One base for every configuration model, and one loader.

- Order of precedence: defaults < YAML file < `--set a.b=value`.
- The text under a field is its only documentation: it feeds `--help`, the JSON schema and the charts.
- Every problem of a file is reported at once; a misspelt key is answered with the nearest valid one.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from infra.errors import ConfigError

MAX_CONFIG_BYTES = 1 << 20


class Config(BaseModel):
    """Base of all configuration: frozen, unknown keys refused, docstrings under fields kept."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())


C = TypeVar("C", bound=Config)


def load_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML (or JSON) file; raises ConfigError when it is absent, too large or not a mapping."""
    if not path.is_file():
        raise ConfigError(f"{path}: no such file. A spec file is needed; pipelines/specs/smart_home.yaml is one to start from.")
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise ConfigError(f"{path}: {path.stat().st_size} bytes. A configuration of at most {MAX_CONFIG_BYTES} bytes is read.")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not readable as YAML: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: a mapping of keys to values is needed, found {type(data).__name__}.")
    return data


def apply_overrides(data: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of `data` with each `a.b=value` set; values are read as YAML. Raises ConfigError on a bad form."""
    result: dict[str, Any] = json.loads(json.dumps(data, default=str))
    for override in overrides:
        dotted, separator, text = override.partition("=")
        keys = dotted.split(".")
        if not separator or not all(keys):
            raise ConfigError(f"--set {override!r}: the form is a.b=value, for example --set training.epochs=1")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {override!r}: the value is not YAML: {error}") from error
        node = result
        for key in keys[:-1]:
            child = node.setdefault(key, {})
            if not isinstance(child, dict):
                raise ConfigError(f"--set {override!r}: {key!r} holds {child!r}, which has no keys below it.")
            node = child
        node[keys[-1]] = value
    return result


def parse(model: type[C], data: Mapping[str, Any], source: str) -> C:
    """`data` as a checked `model`; raises one ConfigError that lists every problem found in `source`."""
    try:
        return model.model_validate(dict(data))
    except ValidationError as error:
        problems = [_problem_line(model, problem) for problem in error.errors(include_url=False, include_input=True)]
        raise ConfigError(f"{source}: {len(problems)} problem(s)\n" + "\n".join(f"  - {line}" for line in problems)) from error


def load(model: type[C], path: Path, overrides: Sequence[str] = ()) -> C:
    """The file at `path`, with overrides applied, as a checked `model`."""
    return parse(model, apply_overrides(load_yaml(path), overrides), str(path))


def _problem_line(model: type[BaseModel], problem: Any) -> str:
    location = ".".join(str(part) for part in problem["loc"])
    if problem["type"] != "extra_forbidden":
        shown = repr(problem["input"])
        return f"{location or '(top level)'}: {problem['msg']} (found {shown[:120]})"
    valid = _keys_at(model, problem["loc"][:-1])
    near = difflib.get_close_matches(str(problem["loc"][-1]), valid, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"valid keys here: {', '.join(sorted(valid))}"
    return f"{location}: unknown key; {hint}"


def _keys_at(model: type[BaseModel], location: Sequence[str | int]) -> list[str]:
    """The valid keys of the model found by walking `location`; union tags and list indices are stepped over."""
    candidates: list[type[BaseModel]] = [model]
    for part in location:
        below = [
            found
            for current in candidates
            if part in current.model_fields
            for found in _models_in(current.model_fields[str(part)].annotation)
        ]
        candidates = below or candidates
    return [key for candidate in candidates for key in candidate.model_fields]


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for argument in get_args(annotation) for found in _models_in(argument)]
