"""The engines by name: the one place that knows which module makes which; a module is imported only when its engine is wanted."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import cast

from infra.contracts import Kind
from serving.config import EngineName, ServeConfig
from serving.engines.base import Engine

MODULES: dict[EngineName, str] = {
    "openvino": "serving.engines.openvino",
    "torch": "serving.engines.torch",
    "vllm": "serving.engines.vllm",
}
MODEL_KINDS: dict[EngineName, tuple[Kind, ...]] = {"openvino": ("quantized",), "torch": ("merged", "base"), "vllm": ("merged", "base")}
"""The kinds of artifact that an engine reads."""


def make_engine(model_dir: Path, config: ServeConfig) -> Engine:
    """The engine that `config` names, for the model in `model_dir`; nothing is loaded before it starts."""
    return cast(Engine, importlib.import_module(MODULES[config.engine]).make_engine(model_dir, config))
