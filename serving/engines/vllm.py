"""vLLM as an engine, for a merged model on a GPU or a CPU; `vllm_steps.py` is its process, under a Python of its own where need be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from serving.adapters import adapter_settings
from serving.config import ServeConfig
from serving.engines.base import Capabilities, GrammarKind
from serving.engines.process import ProcessEngine
from serving.interpreter import engine_python

MAX_TOP_LOGPROBS = 20
GRAMMARS: frozenset[GrammarKind] = frozenset({"json_schema", "regex"})
CAPABILITIES = Capabilities(engine="vllm", max_top_logprobs=MAX_TOP_LOGPROBS, grammars=GRAMMARS)
VARIABLES = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # it would bind every replica to the same cores
    # Threads that wait sleep: spinning makes steps 1.6 to 1.9 times as fast where nothing else runs, and up to 40 times as slow where the
    # cores are shared. The server's own process shares them: on two cores 22 to 23 tokens/s at one stream, and 8 to 25 with spinning.
    "OMP_WAIT_POLICY": "passive",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # this process is one of its own already; another below it could outlive it
    "VLLM_PLUGINS": "",  # no code but its own
    # No telemetry, and nothing said but errors.
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "TORCH_LOGS": "-all",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "PYTHONWARNINGS": "ignore",
}


def make_engine(model_dir: Path, config: ServeConfig) -> ProcessEngine:
    """The engine that `config` describes, for a base or merged model; nothing is loaded before it starts."""
    settings = {
        "model_dir": str(model_dir.absolute()),
        "max_running_requests": config.max_running_requests,
        "cache_bytes": int(config.cache_gb * (1 << 30)),
        "speculative": config.speculative.model_dump(mode="json") if config.speculative else None,
        **adapter_settings(config),
    }
    can_do = replace(CAPABILITIES, takes_min_p=config.speculative is None)  # with guesses vLLM would leave it out and say nothing
    threads = {"OMP_NUM_THREADS": str(config.cpus_per_replica)} if config.cpus_per_replica else {}
    python, variables, interval_s = engine_python(config), {**VARIABLES, **threads}, config.stream_interval_s
    return ProcessEngine(model_dir, "serving.engines.vllm_steps", settings, can_do, python, variables, interval_s)
