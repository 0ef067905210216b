"""Which Python runs an engine, and what is said where none can."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from infra.errors import ConfigError
from serving.config import PoolConfig, ServeConfig, ServeJob
from serving.cores import require_gpus
from serving.interpreter import PACKAGES, engine_python


def script(path: Path, text: str) -> Path:
    """A program at `path` that answers as a Python would be answered by."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_engine_of_this_python_runs_under_it() -> None:
    assert engine_python(ServeConfig(engine="openvino")) == Path(sys.executable)
    assert engine_python(ServeConfig(engine="openvino", engine_python=Path(sys.executable))) == Path(sys.executable)


def test_engine_that_this_python_lacks_runs_in_the_venv_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "prefix", str(tmp_path / ".venv"))
    with pytest.raises(ConfigError, match=r"needs the package 'vllm'.*\.venv-vllm/bin/python does not exist.*make install-vllm"):
        engine_python(ServeConfig(engine="vllm"))
    beside = script(tmp_path / ".venv-vllm/bin/python", "true")
    assert engine_python(ServeConfig(engine="vllm")) == beside


@pytest.mark.parametrize(
    ("text", "said"),
    [("echo vllm", "lacks vllm"), ("echo no such option >&2; exit 3", r"does not run \(no such option\)")],
)
def test_named_python_that_cannot_is_refused_with_what_it_lacks(text: str, said: str, tmp_path: Path) -> None:
    named = script(tmp_path / "python", text)
    with pytest.raises(ConfigError, match=f"{named} {said}.*serve.engine_python"):
        engine_python(ServeConfig(engine="vllm", engine_python=named))


def test_named_python_is_asked_for_the_engine_and_for_this_package(tmp_path: Path) -> None:
    """A real Python without site-packages: it lacks the engine's package, and ours is where the tests run."""
    named = script(tmp_path / "python", f'exec {sys.executable} -S -E "$@"')
    with pytest.raises(ConfigError, match=f"lacks {PACKAGES['openvino']}"):
        engine_python(ServeConfig(engine="openvino", engine_python=named))


def test_named_python_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named = script(tmp_path / "python", "true")
    monkeypatch.chdir(tmp_path)
    assert engine_python(ServeConfig(engine="vllm", engine_python=Path("python"))) == named


def test_more_gpus_than_there_are_is_refused_with_both_numbers() -> None:
    gpu = {"accelerator": "gpu", "engine": "vllm"}
    serve = ServeConfig(pools=[PoolConfig(name="a", num_replicas=2, **gpu), PoolConfig(name="b", **gpu), PoolConfig(name="c")])
    job = ServeJob(output_dir=Path("out"), model_dir=Path("model"), model_name="toy", serve=serve)
    configs = [each.serve for each in job.per_pool]
    require_gpus(configs, num_found=3)
    with pytest.raises(ConfigError, match=r"need 3 GPUs; Ray found 2 .*serve\.gpus_per_replica"):
        require_gpus(configs, num_found=2)
