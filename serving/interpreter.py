"""Which Python runs an engine: libraries whose needs contradict each other live in venvs of their own. Light: the driver asks it too."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from infra.errors import ConfigError
from serving.config import EngineName, ServeConfig

PACKAGES: dict[EngineName, str] = {"openvino": "openvino_genai", "torch": "torch", "vllm": "vllm"}
"""The package that an engine's process imports."""
REMEDIES: dict[EngineName, str] = {
    "openvino": "`pip install 'slipway-ml[serve]'`",
    "torch": "`pip install 'slipway-ml[train]'`",
    "vllm": "`make install-vllm`, or `pip install 'slipway-ml[serve-vllm]'` in that venv",
}
OWN_PACKAGE = "serving"
LOOK_TIMEOUT_S = 60.0
_LOOK = "import sys; from importlib.util import find_spec; print(*[name for name in sys.argv[1:] if find_spec(name) is None])"


def engine_python(config: ServeConfig) -> Path:
    """The Python that `config` names, or this one, or that of `.venv-ENGINE` beside this one's venv: the first that has the engine.

    Raises ConfigError where none has.
    """
    package = PACKAGES[config.engine]
    own, named = Path(sys.executable), config.engine_python
    if named in (None, own) and find_spec(package) is not None:
        return own
    python = named.absolute() if named else Path(sys.prefix).parent / f".venv-{config.engine}" / "bin" / "python"
    if not (lacking := _lacking(python, package)):
        return python
    found = f"{python} {lacking}" if named else f"{own} lacks it, and {python} {lacking}"
    raise ConfigError(
        f"the engine {config.engine!r} needs the package {package!r}: {found}. "
        f"Install it with {REMEDIES[config.engine]}, or name a Python that has it in serve.engine_python."
    )


def _lacking(python: Path, package: str) -> str:
    """What keeps `python` from running the engine; empty where nothing does. Imports neither package."""
    if not python.is_file():
        return "does not exist"
    try:
        command = [str(python), "-c", _LOOK, package, OWN_PACKAGE]
        looked = subprocess.run(command, capture_output=True, text=True, timeout=LOOK_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"does not run ({error})"
    if looked.returncode:
        return f"does not run ({looked.stderr.strip()[-300:]})"
    return f"lacks {looked.stdout.strip()}" if looked.stdout.strip() else ""
