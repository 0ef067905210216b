"""The address of an MLflow store, made safe to write into logs, job files and manifests."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import SplitResult, unquote, urlsplit, urlunsplit

from infra.errors import ConfigError

SQLITE = "sqlite:///"
WAYS = "sqlite:////ABSOLUTE/PATH.db, postgresql+psycopg://USER@HOST/DATABASE or https://HOST"
# Variables that the store's own client reads its user and password from.
SECRETS_OF = {"http": ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"), "postgresql": ("PGUSER", "PGPASSWORD")}


def store_address(uri: str, option: str) -> tuple[str, dict[str, str]]:
    """The address without user and password, and those as the variables that the store's client reads instead.

    A relative sqlite path becomes absolute: programs that we start have other folders. Raises ConfigError on a store that cannot be used.
    """
    if uri.startswith(SQLITE):
        return f"{SQLITE}{Path(uri.removeprefix(SQLITE)).expanduser().absolute()}", {}
    parts = urlsplit(uri)
    family = "http" if parts.scheme in ("http", "https") else parts.scheme.partition("+")[0]
    if family in ("", "file"):
        raise ConfigError(f"{option}={uri}: MLflow's file store has no model registry that two may write to. One of {WAYS} is needed.")
    if family not in SECRETS_OF and parts.password is None:
        return uri, {}
    if family not in SECRETS_OF:
        raise ConfigError(f"{option}: a password in the address of a {family} store cannot be kept out of files. Use one of {WAYS}.")
    given = (parts.username, parts.password)
    secrets = {name: unquote(value) for name, value in zip(SECRETS_OF[family], given, strict=True) if value is not None}
    return urlunsplit(parts._replace(netloc=_host(parts))), secrets


def _host(parts: SplitResult) -> str:
    return parts.netloc.rpartition("@")[2]
