"""Ray's Jobs API, over HTTP: a driver needs no Ray of its own.

Source: docs.ray.io, "Ray Jobs REST API".
"""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, SecretStr

from infra.errors import ConfigError, TransientError

REQUEST_TIMEOUT_S = 30.0
PATIENCE_S = 120.0
RETRY_S = 1.0
State = Literal["PENDING", "RUNNING", "SUCCEEDED", "FAILED", "STOPPED"]
RUNNING: tuple[State, ...] = ("PENDING", "RUNNING")
NOT_FOUND = 404
REFUSED = (401, 403)


class RayJob(BaseModel):
    """What Ray says of a job; its other fields are not read."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    status: State
    message: str | None = None
    driver_exit_code: int | None = None
    """None while it runs, and where the machine that it ran on was lost."""


class RayJobs:
    """The jobs of the Ray cluster whose dashboard is at `address`.

    Every method asks again for two minutes while the cluster does not answer, and then raises TransientError. All raise ConfigError where
    it asks for a key that we do not have.
    """

    def __init__(self, address: str, token: SecretStr | None = None, patience_s: float = PATIENCE_S) -> None:
        if not address.startswith(("http://", "https://")):
            raise ConfigError(
                f"RAY_API_SERVER_ADDRESS={address}: the address of Ray's dashboard is needed, for example http://10.0.0.1:8265."
            )
        self.address, self._token, self._patience_s = address, token, patience_s

    def get(self, name: str) -> RayJob | None:
        """The job of that submission id; None where there is none."""
        status, text = self._request("GET", name)
        return None if status == NOT_FOUND else RayJob.model_validate_json(text)

    def submit(self, name: str, command: str, num_cpus: float, environment: dict[str, str]) -> bool:
        """Starts a job on a node with `num_cpus` cores free; False where there is one of that name already."""
        body: dict[str, Any] = {"submission_id": name, "entrypoint": command, "runtime_env": {"env_vars": environment}}
        if num_cpus:
            body["entrypoint_num_cpus"] = num_cpus
        status, text = self._request("POST", "", body)
        if status == http.client.OK:
            return True
        if "already exists" in text:
            return False
        raise TransientError(f"{self.address}: Ray did not take the job {name}: {last_line(text)}. Run the same command again.")

    def log(self, name: str) -> str:
        """All that the job has printed; empty where its machine is gone."""
        status, text = self._request("GET", f"{name}/logs")
        return str(json.loads(text)["logs"]) if status == http.client.OK else ""

    def _request(self, method: str, path: str, body: dict[str, Any] | None = None) -> tuple[int, str]:
        deadline_s = time.monotonic() + self._patience_s
        while True:
            try:
                status, text = self._ask(method, path, body)
            except (OSError, http.client.HTTPException) as error:
                if time.monotonic() > deadline_s:
                    raise TransientError(
                        f"{self.address}: Ray's Jobs API has not answered for {self._patience_s:.0f} s ({error}). Set "
                        "RAY_API_SERVER_ADDRESS to the cluster's dashboard; what runs there goes on, and the same command follows it."
                    ) from error
                time.sleep(RETRY_S)
                continue
            if status in REFUSED:
                raise ConfigError(f"{self.address}: Ray does not let us in (HTTP {status}). Set RAY_AUTH_TOKEN to the cluster's token.")
            return status, text

    def _ask(self, method: str, path: str, body: dict[str, Any] | None) -> tuple[int, str]:
        headers = {"Content-Type": "application/json"}
        if self._token is not None:
            headers["Authorization"] = f"Bearer {self._token.get_secret_value()}"
        content = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.address}/api/jobs/{path}", content, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=REQUEST_TIMEOUT_S) as response:
                return int(response.status), response.read().decode(errors="replace")
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode(errors="replace")


def last_line(text: str) -> str:
    """The last line that says something: of a traceback the error itself."""
    return ([line for line in text.splitlines() if line.strip()] or [""])[-1]
