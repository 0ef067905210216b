"""What can be refused before anything expensive starts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec

from infra import api_keys, models
from infra.errors import ConfigError, attempted
from infra.files import require_free_space
from infra.network import SERVE_PORT_OPTION, require_free_port
from infra.settings import Settings
from pipelines import serveable
from pipelines.executors.base import needs
from pipelines.executors.ray_jobs_api import RayJobs
from pipelines.runner import Planned
from pipelines.spec import Spec
from serving.interpreter import engine_python
from serving.limits import ENGINE_OF_FORMAT, with_engine_of

MODULES_BY_ENGINE: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "openvino": (("nncf", "openvino"), ("openvino_genai",)),
    "torch": (("torch", "transformers", "bitsandbytes", "accelerate"),) * 2,
    "vllm": (("safetensors",), ()),
}
"""What quantizing for an engine and answering with it need here; an engine's own Python is looked for by itself."""
MODULES_BY_STEP = {
    "base": ("torch", "transformers", "gguf", "safetensors"),
    "train": ("torch", "peft", "ray"),
    "export": ("torch", "optimum", "openvino", "openvino_tokenizers"),
    **{f"quantize-{name}": MODULES_BY_ENGINE[engine][0] for name, engine in ENGINE_OF_FORMAT.items()},
    **{f"{kind}-{name}": MODULES_BY_ENGINE[engine][1] for name, engine in ENGINE_OF_FORMAT.items() for kind in ("predict", "repeat")},
    **{f"tasks-{name}": ("torch", "lm_eval") for name in ("base", "merged")},
    **{f"tasks-{name}": (*MODULES_BY_ENGINE[engine][1], "lm_eval") for name, engine in ENGINE_OF_FORMAT.items()},
}
OWN_PYTHON_ENGINE = "vllm"
QUANTIZE_MODULES = ("optimum", "nncf", "openvino", "openvino_tokenizers", "bitsandbytes")
EXTRA_BY_MODULE = {**dict.fromkeys(QUANTIZE_MODULES, "quantize"), "openvino_genai": "serve", "lm_eval": "lm-eval"}
# Weights are written four times at 16 bits (base, merged, and an attempt of each), twice at 32 where they are exported, and a candidate
# takes what 16 bits do at most; a quantized GGUF grows fourfold.
WEIGHT_COPIES = 4
EXPORT_COPIES = 2
LIGHT_COPIES = 1  # where programs run elsewhere, their weights stay in the store, but for those of the model that is chosen
GGUF_GROWTH = 4
BASE_NEED_BYTES = 1 << 30
RAY_PATIENCE_S = 10.0


def check(spec: Spec, planned: Sequence[Planned], settings: Settings, will_serve: bool) -> None:
    """Raises one ConfigError with everything that would stop the run later: missing packages, a model that could not be served, a disk
    without room, a port in use.
    """
    problems: list[str] = []
    checks = [partial(serveable.check_source, spec), partial(_check_executor, settings), partial(_check_disk, spec, planned, settings)]
    if settings.executor == "local":
        checks.append(partial(_check_modules, planned))
    if settings.executor == "local" or will_serve:
        checks.append(partial(_check_engine_python, spec))
    if will_serve:
        checks += [
            partial(_check_server, spec),
            partial(serveable.check_engines, spec),
            partial(_check_adapters, spec),
            partial(_check_port, spec),
            partial(_check_key, spec, settings),
        ]
    for inspect in checks:
        attempted(inspect, problems)
    if problems:
        raise ConfigError("\n".join(problems))


def _check_executor(settings: Settings) -> None:
    """Raises TransientError where all is set and the cluster does not answer."""
    problems = needs(settings)
    if settings.executor != "local" and settings.tracking_uri.startswith("sqlite:"):
        problems.append(
            f"--executor {settings.executor}: programs on other machines report to MLflow, and {settings.tracking_uri} is a file of this "
            "machine. Set MLFLOW_TRACKING_URI to a server or a PostgreSQL database."
        )
    if problems:
        raise ConfigError("\n".join(problems))
    if settings.executor == "ray":
        RayJobs(settings.ray_jobs_address, settings.ray_token, RAY_PATIENCE_S).get("slipway")


def _check_server(spec: Spec) -> None:
    """The server runs here wherever the steps do."""
    engines = sorted({ENGINE_OF_FORMAT[name] for name in spec.quantize.formats})
    missing = sorted({name for engine in engines for name in (*MODULES_BY_ENGINE[engine][1], "ray") if find_spec(name) is None})
    if missing and spec.serve.engine_python is None:
        raise ConfigError(
            f"to serve what is promoted on this machine, these packages are needed: {', '.join(missing)}. "
            "Install `pip install 'slipway-ml[serve]'`, or run with --no-serve."
        )


def _check_modules(planned: Sequence[Planned]) -> None:
    wanted = [name for item in planned if item.will_run for name in MODULES_BY_STEP.get(item.step.name, ())]
    missing = sorted({name for name in wanted if find_spec(name) is None})
    if missing:
        extras = ",".join(sorted({EXTRA_BY_MODULE.get(name, "train") for name in missing}))
        raise ConfigError(
            f"these packages are not installed: {', '.join(missing)}. Install them with `pip install 'slipway-ml[{extras}]'`."
        )


def _check_engine_python(spec: Spec) -> None:
    """Raises ConfigError where a candidate's engine, which has a Python of its own, has none."""
    for name in spec.quantize.formats:
        if ENGINE_OF_FORMAT[name] == OWN_PYTHON_ENGINE:
            engine_python(with_engine_of(spec.serve, name))


def _check_disk(spec: Spec, planned: Sequence[Planned], settings: Settings) -> None:
    if not any(item.will_run for item in planned) or models.is_remote(spec.base_model):
        return
    found = models.locate(spec.base_model)
    if found.is_file():
        weights_bytes = found.stat().st_size * GGUF_GROWTH
    else:
        weights_bytes = sum(path.stat().st_size for path in found.glob("*.safetensors"))
    is_exported = any(item.step.name == "export" for item in planned)
    copies = WEIGHT_COPIES + is_exported * EXPORT_COPIES + sum(item.step.produces == "quantized" for item in planned)
    copies = copies if settings.executor == "local" else LIGHT_COPIES
    require_free_space(settings.home, weights_bytes * copies + BASE_NEED_BYTES, "this run's models")


def _check_adapters(spec: Spec) -> None:
    if spec.serve.adapters:
        raise ConfigError(
            "serve.adapters: a run serves what it has merged, and adapters go on a base with none in it. "
            "Set serve.adapters={}, and serve the base's folder with `slipway serve FOLDER --set serve.adapters.NAME=FOLDER`."
        )


def _check_port(spec: Spec) -> None:
    require_free_port(spec.serve.host, spec.serve.port, SERVE_PORT_OPTION)


def _check_key(spec: Spec, settings: Settings) -> None:
    """The run ends with a request to the server, which has to let it in."""
    path = spec.serve.api_keys_file
    if path is None:
        return
    keys = api_keys.read(path)
    if settings.api_key is None or api_keys.find(keys, settings.api_key.get_secret_value()) is None:
        raise ConfigError(f"serve.api_keys_file {path}: SLIPWAY_API_KEY holds none of its keys. Set it to one, or serve without the file.")
