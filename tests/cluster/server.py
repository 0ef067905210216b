"""A small API server of Kubernetes on loopback, for tests: real HTTP over TLS, real status codes, nothing behind it that runs pods.

- It knows the built-in kinds that charts use, by the schemas of Kubernetes itself, and whatever a CustomResourceDefinition brings.
- A test plays the controllers: it changes statuses through the API, and writes a pod's log by `Server.write_log`. Only what goes with a
  deleted owner, namespace or definition is seen to here, at once.
- It can be made to misbehave as real ones do: `cut`, `compact`, `fail_next`.
- Who may do what is decided by Roles and RoleBindings (rbac.py), for those who come with a ServiceAccount's token.
- What it does not do: call webhooks, fill in most defaults of built-in kinds, speak protobuf, convert versions, or
  keep a list's later pages as they were at its first.

The suite `test_contract_*.py` says what it promises; `make test-cluster` asks the same of a real one.
"""

from __future__ import annotations

import base64
import json
import secrets
import socket
import threading
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml

from tests.cluster import rbac, routes
from tests.cluster.certificate import certificate_and_key, server_context
from tests.cluster.faults import Fault, bad_request
from tests.cluster.objects import Objects
from tests.cluster.podlogs import PodLogs
from tests.cluster.rbac import Account

MAX_BODY_BYTES = 3 << 20


class Server(ThreadingHTTPServer):
    """The server; `serve` runs one."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        self.objects = Objects()
        self.logs = PodLogs()
        self.token = secrets.token_hex(16)
        """Of the tests themselves, who may do everything."""
        self._accounts: dict[str, Account] = {}
        self.bookmark_s = 0.5
        """Silence after which a watch is sent a bookmark; a minute on a real server."""
        self.log: list[str] = []
        """Every request, `METHOD path?query status`."""
        self.crashes: list[str] = []
        """Tracebacks of requests that the server itself could not take: a test that ends with one has found a fault of the server."""
        self.kinds_away: set[str] = set()
        """API versions that answer 503, as one does whose own server is away, such as that of metrics."""
        self._faults: list[Fault | None] = []
        self._connections: set[socket.socket] = set()
        super().__init__(("127.0.0.1", 0), _Handler)
        # The handshake is left to the connection's own thread.
        self.socket = server_context().wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"https://127.0.0.1:{self.server_address[1]}"

    def account_token(self, namespace: str, name: str) -> str:
        """A token of a ServiceAccount that is there, as a kubelet mounts it into a pod; it is worth nothing once the account is gone."""
        account = rbac.live_account(self.objects.store, namespace, name)
        assert account, f"no ServiceAccount {namespace}/{name}"
        token = secrets.token_hex(16)
        self._accounts[token] = account
        return token

    def account_of(self, authorization: str) -> Account | None:
        """Whose token a request shows; None for the tests' own. Raises Fault for any other."""
        kind, _, token = authorization.partition(" ")
        if kind.lower() == "bearer" and token == self.token:
            return None
        found = self._accounts.get(token)
        if found is None or rbac.live_account(self.objects.store, found.namespace, found.name) != found:
            raise Fault(401, "Unauthorized", "Unauthorized")
        return found

    def kubeconfig(self, file: Path, namespace: str = "default", token: str | None = None) -> Path:
        """Writes a kubeconfig for this server to the file, of the tests themselves or of who has that token; gives it back."""
        authority = base64.b64encode(certificate_and_key()[0]).decode()
        content = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "loopback",
            "clusters": [{"name": "loopback", "cluster": {"server": self.url, "certificate-authority-data": authority}}],
            "users": [{"name": "tester", "user": {"token": token or self.token}}],
            "contexts": [{"name": "loopback", "context": {"cluster": "loopback", "user": "tester", "namespace": namespace}}],
        }
        file.write_text(yaml.safe_dump(content))
        return file

    def install(self, definitions: Iterable[dict[str, Any]]) -> None:
        """Brings the kinds of CustomResourceDefinitions, without the second that each of KubeRay's takes by way of the API."""
        for definition in definitions:
            self.objects.kinds.define(definition)

    def write_log(self, namespace: str, pod: str, text: str, container: str = "") -> None:
        """Adds lines to a pod's log."""
        self.logs.write(namespace, pod, container, text)

    def fail_next(self, *faults: Fault | None) -> None:
        """Answers the next requests by these faults, one each, and as ever where it is None."""
        self._faults += faults

    def recover(self) -> None:
        """Forgets the faults that no request has met."""
        self._faults.clear()

    def next_fault(self) -> Fault | None:
        """The fault that the next request is to get."""
        return self._faults.pop(0) if self._faults else None

    def cut(self) -> None:
        """Cuts every connection, as a load balancer does that is restarted."""
        for connection in list(self._connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def compact(self) -> None:
        """Forgets the history: a watch that is opened from before now is told 410."""
        self.objects.store.compact()

    def process_request(self, request: Any, client_address: Any) -> None:
        self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that is gone is no error of the server."""


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server

    def do_GET(self) -> None:
        self._answer()

    do_POST = do_PUT = do_PATCH = do_DELETE = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the server keeps its own list."""

    def _answer(self) -> None:
        parts = urlsplit(self.path)
        request = routes.Request(self.command, parts.path, {key: values[-1] for key, values in parse_qs(parts.query).items()})
        try:
            body = self._body()
            request.account = self.server.account_of(self.headers.get("Authorization", ""))
            if fault := self.server.next_fault():
                raise fault
            request.content_type = self.headers.get("Content-Type", "application/json").partition(";")[0]
            request.user_agent = self.headers.get("User-Agent", "unknown").partition("/")[0]
            request.body = self._parsed(body)
            answer = routes.answer(self.server, request)
        except Fault as fault:
            answer = routes.Reply(fault.code, fault.status(), headers=fault.headers)
        except Exception:
            self.server.crashes.append(traceback.format_exc())
            answer = routes.Reply(500, Fault(500, "InternalError", "the server itself is at fault: see `Server.crashes`").status())
        self.server.log.append(f"{self.command} {self.path} {answer.code}")
        self._send(answer)

    def _body(self) -> bytes:
        length = int(self.headers.get("Content-Length") or 0)
        if length > MAX_BODY_BYTES:
            self.close_connection = True
            while length > 0 and (chunk := self.rfile.read(min(length, 1 << 16))):  # or the client is cut off before it hears why
                length -= len(chunk)
            raise Fault(413, "RequestEntityTooLarge", f"Request entity too large: limit is {MAX_BODY_BYTES}")
        return self.rfile.read(length)

    def _parsed(self, body: bytes) -> Any:
        kind = self.headers.get("Content-Type", "application/json").partition(";")[0]
        if body and not kind.endswith(("json", "yaml")):  # such as protobuf; clients then send JSON
            raise Fault(415, "UnsupportedMediaType", f"the body of the request was in an unknown format: {kind}")
        try:
            return json.loads(body or b"null")
        except ValueError as error:
            if kind.endswith("yaml"):
                return yaml.safe_load(body)
            raise bad_request(f"the object provided is unrecognized: {error}") from error

    def _send(self, answer: routes.Reply) -> None:
        self.send_response(answer.code)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Type", answer.content_type)
        if answer.stream is None:
            content = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
            return
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for chunk in answer.stream:
            self.wfile.write(f"{len(chunk):x}\r\n".encode() + chunk + b"\r\n")
            self.wfile.flush()
        self.wfile.write(b"0\r\n\r\n")


@contextmanager
def serve() -> Iterator[Server]:
    """A server that runs until the end of the block."""
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, name="apiserver", daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.cut()
        server.shutdown()
        server.server_close()
        thread.join()
    assert not server.crashes, server.crashes[0]
