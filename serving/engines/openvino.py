"""OpenVINO GenAI's continuous batching as an engine; `openvino_steps.py` is its process."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from serving.adapters import adapter_settings
from serving.config import Precision, ServeConfig, SpeculativeConfig
from serving.engines.base import Capabilities, GrammarKind
from serving.engines.process import ProcessEngine
from serving.interpreter import engine_python

TOKENIZER_NAME = "openvino_tokenizer.xml"
GRAMMARS: frozenset[GrammarKind] = frozenset({"json_schema", "regex"})
VARIABLES = {
    # One heap, of which `memory.py` gives back every few seconds what is free: as little memory as an allocator that keeps nothing (both 15
    # to 17 MB less than by default), at 1.07 and 1.13 times the tokens per second with 16 requests of many lengths at once, 0.99 with 32.
    "MALLOC_ARENA_MAX": "1",
    "OPENBLAS_NUM_THREADS": "1",  # numpy only holds tokens here; a second thread costs 2 MB, and turns for nothing while the model loads
}


class OpenVinoEngine(ProcessEngine):
    """A model folder with `openvino_model.xml`, answering up to `max_running_requests` together with `cache_gb` GB of KV cache.

    `adapters` is what `adapter_settings` says of them.
    """

    def __init__(
        self,
        model_dir: Path,
        max_running_requests: int,
        cache_gb: float,
        num_threads: int | None = None,
        precision: Precision = "f32",
        python: Path | None = None,
        adapters: Mapping[str, Any] | None = None,
        speculative: SpeculativeConfig | None = None,
        stream_interval_s: float = 0.0,
    ) -> None:
        settings: dict[str, Any] = {
            "model_dir": str(model_dir.absolute()),
            "max_running_requests": max_running_requests,
            "cache_gb": cache_gb,
            "num_threads": num_threads,
            "precision": precision,
            **(adapters or {}),
        }
        if speculative is not None:
            settings["speculative"] = speculative.model_dump(mode="json")
        super().__init__(
            model_dir,
            "serving.engines.openvino_steps",
            settings,
            capabilities(model_dir),
            python,
            stream_interval_s=stream_interval_s,
            default_variables=VARIABLES,
        )


def make_engine(model_dir: Path, config: ServeConfig) -> OpenVinoEngine:
    """The engine that `config` describes; nothing is loaded before it starts."""
    python = engine_python(config)
    return OpenVinoEngine(
        model_dir,
        config.max_running_requests,
        config.cache_gb,
        config.cpus_per_replica,
        config.precision,
        python,
        adapter_settings(config),
        config.speculative,
        config.stream_interval_s,
    )


def capabilities(model_dir: Path) -> Capabilities:
    """What OpenVINO can do with this folder: its grammars need the vocabulary, which lies in the exported tokenizer."""
    return Capabilities(
        engine="openvino",
        max_top_logprobs=0,
        grammars=GRAMMARS if (model_dir / TOKENIZER_NAME).is_file() else frozenset(),
        no_grammar_reason=f"the model's folder has no {TOKENIZER_NAME}; run the quantize step again",
    )
