"""PyTorch and transformers as an engine: the reference, on any device; `torch_steps.py` is its process, and the only one with torch."""

from __future__ import annotations

from pathlib import Path

from serving.adapters import adapter_settings
from serving.config import ServeConfig
from serving.engines.base import Capabilities
from serving.engines.process import ProcessEngine
from serving.interpreter import engine_python

CAPABILITIES = Capabilities(engine="torch", max_top_logprobs=20)


def make_engine(model_dir: Path, config: ServeConfig) -> ProcessEngine:
    """The engine that `config` describes, for a base or merged model; nothing is loaded before it starts."""
    settings = {
        "model_dir": str(model_dir.absolute()),
        "max_running_requests": config.max_running_requests,
        "weights": config.weights,
        "num_threads": config.cpus_per_replica,
        "speculative": config.speculative.model_dump(mode="json") if config.speculative else None,
        **adapter_settings(config),
    }
    python, interval_s = engine_python(config), config.stream_interval_s
    return ProcessEngine(model_dir, "serving.engines.torch_steps", settings, CAPABILITIES, python, stream_interval_s=interval_s)
