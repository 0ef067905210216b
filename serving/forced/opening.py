"""A model opened by its engine's own library, for its whole distributions."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from infra.errors import ArtifactError
from serving.config import EngineName, ServeConfig

Run = Callable[[Sequence[int], int], Any]
"""From token ids, the last A of them an answer, to log-probabilities (A, V) of what stands in the place of each."""

MODULES: dict[EngineName, str] = {"openvino": "serving.forced.openvino", "torch": "serving.forced.torch"}
"""The engines whose library gives whole distributions; of another, the server's own log-probabilities are compared."""


def open_model(model_dir: Path, serve: ServeConfig) -> Run | None:
    """The model as a function; None where the engine's library gives no distributions. Raises ArtifactError where it cannot read it."""
    if serve.engine not in MODULES:
        return None
    make: Callable[[Path, ServeConfig], Run] = importlib.import_module(MODULES[serve.engine]).log_probabilities
    try:
        return make(model_dir, serve)
    except (OSError, RuntimeError, ValueError) as error:
        raise ArtifactError(f"{model_dir}: the engine {serve.engine!r} cannot read it: {error}. Quantize it again.") from error
