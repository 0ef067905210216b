"""The command of the images' HEALTHCHECK, asked of a real server."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from infra.network import free_port


class Answers(BaseHTTPRequestHandler):
    """The status is the path: /200, /503."""

    def do_GET(self) -> None:
        self.send_response(int(self.path[1:]))
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the test's own output is enough."""


@pytest.fixture
def url() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Answers)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def check(url: str) -> int:
    return subprocess.run([sys.executable, "-m", "infra.healthcheck", url], capture_output=True, check=False).returncode


def test_healthcheck_of_a_server_that_answers_is_0_and_of_one_that_refuses_1(url: str) -> None:
    assert check(f"{url}/200") == 0
    assert check(f"{url}/503") == 1


def test_healthcheck_of_no_server_is_1() -> None:
    assert check(f"http://127.0.0.1:{free_port()}/health") == 1
