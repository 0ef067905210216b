"""Starts the serving stack on a model folder and talks to it; the stack itself is never imported."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from infra.contracts import read_manifest
from infra.errors import ConfigError, TransientError
from infra.files import read_json
from infra.network import SERVE_PORT_OPTION, require_free_port
from infra.process import Job
from infra.provenance import capture
from infra.settings import Settings
from pipelines.executors import local
from serving.config import ServeConfig, ServeJob
from serving.limits import with_engine_of

SERVING_NAME = "serving.json"
REQUEST_TIMEOUT_S = 120.0
FIGURES_TIMEOUT_S = 10.0
MAX_FIGURES_BYTES = 1 << 26


@dataclass(frozen=True)
class Served:
    """A model that answers."""

    url: str
    model_name: str
    log_file: Path
    is_running: Callable[[], bool]


@contextmanager
def serving(settings: Settings, model_dir: Path, model_name: str, config: ServeConfig) -> Iterator[Served]:
    """Serves the folder while the block runs, and stops it after; raises what `serving_in` does."""
    with serving_in(settings.home / "serving" / f"{model_name}-{config.port}", model_dir, model_name, config) as served:
        yield served


@contextmanager
def serving_in(folder: Path, model_dir: Path, model_name: str, config: ServeConfig) -> Iterator[Served]:
    """The same with the server's own files in `folder`.

    Raises ConfigError when the port is taken, ArtifactError when the folder is not what its manifest says, TransientError on a late start.
    """
    config = with_engine(config, model_dir)
    require_free_port(config.host, config.port, SERVE_PORT_OPTION)
    folder.mkdir(parents=True, exist_ok=True)
    ready_file = folder / SERVING_NAME
    ready_file.unlink(missing_ok=True)
    log_file, config_file = folder / "serving.log", folder / "config.json"
    job: Job = ServeJob(output_dir=folder, provenance=capture(), model_dir=model_dir.absolute(), model_name=model_name, serve=config)
    with log_file.open("wb") as log:
        process = local.start("serving.app", job, config_file, log)
        try:
            deadline_s = time.monotonic() + config.start_timeout_s
            while not ready_file.is_file():
                if process.poll() is not None:
                    raise local.failure("serving.app", process.returncode, config_file, log_file)
                if time.monotonic() > deadline_s:
                    raise TransientError(f"serving was not ready after {config.start_timeout_s:g} s; its log is {log_file}.")
                time.sleep(local.POLL_S)
            yield Served(read_json(ready_file)["url"], model_name, log_file, lambda: process.poll() is None)
        finally:
            local.stop(process, config.drain_timeout_s + local.STOP_TIMEOUT_S)
            ready_file.unlink(missing_ok=True)


def with_engine(config: ServeConfig, model_dir: Path) -> ServeConfig:
    """`config` with the engine that reads the folder's weights, where it names none. Raises ArtifactError where there is no model."""
    return with_engine_of(config, read_manifest(model_dir).weight_format)


def chat(url: str, body: dict[str, Any], api_key: SecretStr | None) -> dict[str, Any]:
    """One chat completion. Raises TransientError when the server cannot be reached or refuses, ConfigError when it wants another key."""
    return post(url, "/v1/chat/completions", body, api_key)


def post(url: str, path: str, body: dict[str, Any], api_key: SecretStr | None) -> dict[str, Any]:
    """The JSON answer to a JSON body; raises what `chat` does."""
    with _post(url, path, body, api_key) as response:
        return dict(json.load(response))


def stream_chat(url: str, body: dict[str, Any], api_key: SecretStr | None) -> Iterator[str]:
    """The pieces of text of one streamed chat completion."""
    with _post(url, "/v1/chat/completions", {**body, "stream": True}, api_key) as response:
        for line in response:
            data = line.decode().removeprefix("data: ").strip()
            if not data or data == "[DONE]":
                continue
            for choice in json.loads(data).get("choices", ()):
                yield choice.get("delta", {}).get("content") or ""


def model_names(url: str, api_key: SecretStr | None) -> list[str]:
    """The models a server offers. Raises TransientError when it cannot be reached, ConfigError when it wants another key."""
    with _open(_request(url, "/v1/models"), api_key) as response:
        return [model["id"] for model in json.load(response)["data"]]


def figures(url: str, api_key: SecretStr | None) -> str:
    """What a server tells Prometheus. Raises TransientError when it cannot be reached, ConfigError when it wants another key."""
    with _open(_request(url, "/metrics"), api_key, FIGURES_TIMEOUT_S) as response:
        try:
            return str(response.read(MAX_FIGURES_BYTES), "utf-8", "replace")
        except (OSError, http.client.HTTPException) as error:
            raise TransientError(f"{url}/metrics ended before its answer was whole ({error}). Try again.") from error


def _post(url: str, path: str, body: dict[str, Any], api_key: SecretStr | None) -> Any:
    request = _request(url, path)
    request.data = json.dumps(body).encode()
    request.add_header("Content-Type", "application/json")
    return _open(request, api_key)


def _request(url: str, path: str) -> urllib.request.Request:
    """A request. Raises ConfigError where `url` is none of HTTP."""
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"--url {url}: an address of a server is needed, for example http://127.0.0.1:8000.")
    return urllib.request.Request(url.rstrip("/") + path)


def _open(request: urllib.request.Request, api_key: SecretStr | None, timeout_s: float = REQUEST_TIMEOUT_S) -> Any:
    if api_key is not None:
        request.add_unredirected_header("Authorization", f"Bearer {api_key.get_secret_value()}")
    try:
        return urllib.request.urlopen(request, timeout=timeout_s)
    except urllib.error.HTTPError as error:
        if error.code == HTTPStatus.UNAUTHORIZED:
            found = "no key was sent" if api_key is None else "the key that was sent is not valid there"
            raise ConfigError(
                f"{request.full_url}: {found}. Set SLIPWAY_API_KEY to one that is; `slipway keys add NAME` makes one."
            ) from error
        raise TransientError(f"{request.full_url} answered {error.code}: {error.read().decode(errors='replace')[:500]}") from error
    except (OSError, http.client.HTTPException) as error:
        raise TransientError(f"{request.full_url} cannot be reached ({error}). Is `slipway serve` running there?") from error


def sample_messages(rows: Sequence[str]) -> list[dict[str, Any]]:
    """The messages of the first held-out row before its answer."""
    messages = json.loads(rows[0])["messages"]
    last = max(index for index, message in enumerate(messages) if message["role"] == "assistant")
    return [dict(message) for message in messages[:last]]
