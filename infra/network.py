"""Addresses to listen on."""

from __future__ import annotations

import socket

from infra.errors import ConfigError

SERVE_PORT_OPTION = "--set serve.port="


def require_free_port(host: str, port: int, option: str) -> None:
    """Raises ConfigError when nothing can listen on the address; a server of the moment before, in TIME_WAIT, does no harm.

    `option` begins the command-line option that names another port, such as `--port `.
    """
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"port {port} on {host} cannot be used ({error.strerror}). Stop what listens there, or take another: {option}{port + 1}"
            ) from error
