"""LoRA adapters beside one model: whether they may be served, which one a request means, and what an engine is told of them.

- An adapter belongs to one base, by digest: put on any other model, or on its base with an adapter merged into it already, it would
  answer without an error and wrongly.
- Two adapters never share a cached prefix: what a prompt leaves in the cache depends on who read it.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import asdict
from pathlib import Path
from typing import Any

from infra.contracts import Manifest, read_manifest, verify
from infra.errors import ArtifactError, ConfigError
from serving.adapter_files import AdapterFiles
from serving.config import ServeConfig
from serving.limits import adapter_problems


def adapter_named(name: str, model_name: str, adapters: Container[str]) -> str | None:
    """The adapter that a client means by `NAME` or by `MODEL:NAME`; None where there is no such one."""
    bare = name.removeprefix(f"{model_name}:")
    return bare if bare in adapters else None


def require_adapters(config: ServeConfig, model_dir: Path, model: Manifest) -> None:
    """Raises one ConfigError with everything that keeps the adapters from being served on the model in `model_dir`."""
    problems = [
        f"{name} ({folder}): {problem}"
        for name, folder in config.adapters.items()
        for problem in _problems(folder, config.engine, model_dir, model)
    ]
    if problems:
        raise ConfigError("serve.adapters: not all of them can be served\n" + "\n".join(f"  - {line}" for line in problems))


def with_absolute_adapters(config: ServeConfig) -> ServeConfig:
    """The configuration with paths to its adapters that hold in any folder."""
    return config.model_copy(update={"adapters": {name: folder.absolute() for name, folder in config.adapters.items()}})


def adapter_settings(config: ServeConfig) -> dict[str, Any]:
    """What the engine's process is told of the adapters; empty where there are none. Raises ArtifactError where one is not there."""
    if not config.adapters:
        return {}
    adapters = {name: asdict(_files(folder)) for name, folder in config.adapters.items()}
    return {"adapters": adapters, "max_adapters": min(config.max_adapters, len(adapters))}


def _files(folder: Path) -> AdapterFiles:
    facts = read_manifest(folder).model
    if facts is None or facts.adapter is None:
        raise ArtifactError(f"{folder}: its manifest holds no facts of an adapter. Train it again.")
    return AdapterFiles(folder=str(folder.absolute()), rank=facts.adapter.rank, scale=facts.adapter.scale)


def _problems(folder: Path, engine: str, model_dir: Path, model: Manifest) -> list[str]:
    """Why one adapter cannot be served; empty where it can."""
    try:
        facts = verify(folder, ("adapter",)).model
    except ArtifactError as error:
        return [error.message]
    if facts is None or facts.adapter is None:
        return ["its manifest holds no facts of an adapter. Train it again."]
    problems = [f"{problem}." for problem in adapter_problems(engine, facts.adapter)]
    served = base_digest(model)
    if facts.base_digest != served:
        found = f"{model_dir} is made of {served}"
        if model.model is not None and model.model.base_digest == facts.base_digest:
            found = f"{model_dir} is that base with an adapter merged into it already"
        needed = "Serve that base itself, quantized where the engine reads it so"
        problems.append(f"trained on the base {facts.base_digest}, and {found}. {needed}.")
    return problems


def base_digest(model: Manifest) -> str:
    """Digest of the 16-bit model whose weights a folder holds: its own, or that of what it was quantized from."""
    return model.parents.get("merged", "") if model.kind == "quantized" else model.digest
