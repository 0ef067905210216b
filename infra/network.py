"""Addresses to listen on, and to call."""

from __future__ import annotations

import socket

from infra.errors import ConfigError, TransientError

SERVE_PORT_OPTION = "--set serve.port="
CONNECT_TIMEOUT_S = 5.0


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


def free_port() -> int:
    """A port of this machine that nothing listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def require_listener(address: str, variable: str) -> None:
    """Raises ConfigError when `address`, from the environment variable, is not host:port, and TransientError when nothing listens there."""
    host, separator, port = address.rpartition(":")
    if not (separator and host and port.isdigit()):
        raise ConfigError(f"{variable}={address}: the form is host:port, for example {variable}=10.0.0.1:6379.")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise TransientError(f"{variable}={address}: nothing answers there ({error}). Start it, or unset {variable}.") from error
