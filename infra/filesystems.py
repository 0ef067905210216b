"""Places named by URL, as fsspec knows them: `file:///folder`, `s3://bucket/prefix`, `gs://`, `az://`, `memory://`.

Object stores are spoken to by obstore (one wheel, no dependencies); s3fs would hold botocore three patch releases wide. Both take their
keys and addresses from the environment (`AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT_URL`, ...), so that none is ever in a URL, a job or a log.
"""

from __future__ import annotations

import atexit
import os
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from infra.errors import ConfigError

END_TIMEOUT_S = 5.0
OBJECT_STORES = ("s3", "gs", "az")
WAYS = "file:///FOLDER, s3://BUCKET/PREFIX, gs://BUCKET/PREFIX or az://CONTAINER/PREFIX"


def open_place(url: str) -> tuple[Any, str]:
    """The fsspec file system of `url` and the path in it, without a slash at its end.

    Raises ConfigError on an address that holds a password, on one of an unknown kind, and where the packages are missing.
    """
    scheme, parts = check_url(url), urlsplit(url)
    try:
        import fsspec

        if scheme in OBJECT_STORES:
            _use_obstore()
    except ImportError as error:
        raise ConfigError(
            f"{url}: the package {error.name!r} is needed to reach it. Install `pip install 'slipway-ml[stores]'`."
        ) from error
    files, root = fsspec.url_to_fs(url if parts.scheme else Path(url).expanduser().absolute().as_uri())
    return files, str(root).rstrip("/")


def check_url(url: str, option: str = "") -> str:
    """The URL's scheme; `file` for a plain path. Raises ConfigError, naming `option`, on what could not be used."""
    parts = urlsplit(url)
    scheme = parts.scheme or "file"
    if parts.password is not None or (parts.username is not None and scheme in OBJECT_STORES):
        raise ConfigError(
            f"{option}{scheme}://...: the address holds a key, which would be written into jobs and logs. Use AWS_* variables."
        )
    if scheme not in (*OBJECT_STORES, "file", "memory"):
        raise ConfigError(f"{option}{url}: {scheme!r} is no kind of store that is known here. Write one of {WAYS}.")
    return scheme


def _use_obstore() -> None:
    """Makes fsspec reach object stores by obstore in this process; a store at an http:// address (MinIO in a cluster) is allowed."""
    import fsspec.config
    from obstore.fsspec import register

    register(list(OBJECT_STORES))
    endpoint = os.environ.get("AWS_ENDPOINT_URL", "")
    fsspec.config.conf["s3"] = {"client_options": {"allow_http": True}} if endpoint.startswith("http://") else {}
    atexit.unregister(_end_thread)
    atexit.register(_end_thread)


def _end_thread() -> None:
    """Ends fsspec's thread before the interpreter ends: of busy programs that left it running, 6 of 150 aborted after their last line."""
    import fsspec.asyn

    loop, thread = fsspec.asyn.loop[0], fsspec.asyn.iothread[0]
    if loop is not None and thread is not None:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(END_TIMEOUT_S)
