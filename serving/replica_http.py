"""A replica's own HTTP server: on the event loop that answers, at a port that only its front knows to ask."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import socket

import uvicorn
from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from infra.errors import TransientError
from serving.announcement import TOKEN_HEADER
from serving.errors import ApiError

BACKLOG = 2048
KEEP_ALIVE_S = 75  # longer than the front keeps a connection, so that it is never the replica that ends one in the front's hands
POLL_S = 0.05


def _listen(host: str, ports: tuple[int, int]) -> socket.socket:
    for port in range(ports[0], ports[1] + 1):
        with contextlib.suppress(OSError):
            return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=BACKLOG)
    raise TransientError(f"{host}: none of the ports {ports[0]} to {ports[1]} can be listened at. Raise num_replica_ports, or free some.")


class FromFront:
    """Answers 403 to whoever is not the front: the checks and the queue of the front would be passed by."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app = app
        self._token = token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        shown = Headers(scope=scope).get(TOKEN_HEADER, "") if scope["type"] == "http" else ""
        if not hmac.compare_digest(shown.encode(), self._token):
            error = ApiError("this is a replica's own port. Ask the server's.", 403)
            await JSONResponse(error.body, error.status)(scope, receive, send)
            return
        await self._app(scope, receive, send)


class ReplicaServer:
    """Serves an app on the running event loop, at the first free port of `host` from the first to the last of `ports`; 0 means any.

    Raises TransientError where none of them is free.
    """

    def __init__(self, app: ASGIApp, host: str, ports: tuple[int, int] = (0, 0)) -> None:
        self._socket = _listen(host, ports)
        # Its connections inherit this. asyncio's own loop sets it only on sockets that name their protocol, which `create_server` does not;
        # without it an answer in two writes waits 40 ms for the front's delayed acknowledgement of the first.
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        config = uvicorn.Config(app, loop="none", http="httptools", ws="none", lifespan="off", log_config=None, access_log=False)
        config.timeout_keep_alive = KEEP_ALIVE_S
        self._server = uvicorn.Server(config)
        self._task = asyncio.create_task(self._server.serve(sockets=[self._socket]))

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self._socket.getsockname()[1])

    async def drain(self) -> None:
        """Returns when no request is running."""
        while self._server.server_state.tasks:
            await asyncio.sleep(POLL_S)

    async def stop(self) -> None:
        """Ends it, and the requests that still run."""
        self._server.should_exit = self._server.force_exit = True
        await self._task
        self._socket.close()
