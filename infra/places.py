"""Files below one URL: written whole, read whole, and errors told apart by what can be done about them."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from infra.errors import ConfigError, SlipwayError, TransientError
from infra.files import write_bytes_atomic, written_whole
from infra.filesystems import open_place

T = TypeVar("T")
REFUSALS = ("PermissionDeniedError", "UnauthenticatedError", "NotSupportedError")


class Place:
    """What lies below one URL, by names such as `artifacts/base-1/manifest.json`.

    Every method raises TransientError when the store does not answer, after the client's own tries, and ConfigError when it refuses us.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._files, self._root = open_place(url)
        self._is_local = "file" in ((protocol,) if isinstance(protocol := self._files.protocol, str) else protocol)

    def exists(self, name: str) -> bool:
        """Whether a file, or anything below a folder, has this name."""
        return bool(self._asked(name, lambda: self._files.exists(self._at(name))))

    def read(self, name: str) -> bytes | None:
        """The bytes of a file, None where there is none."""

        def read() -> bytes | None:
            try:
                return bytes(self._files.cat_file(self._at(name)))
            except FileNotFoundError:
                return None

        return self._asked(name, read)

    def write(self, name: str, content: bytes) -> None:
        """Makes `name` a file of these bytes; a reader sees the old ones or the new ones."""
        if self._is_local:
            self._asked(name, lambda: write_bytes_atomic(Path(self._at(name)), content))
        else:
            self._asked(name, lambda: self._files.pipe_file(self._at(name), content))

    def put(self, path: Path, name: str) -> None:
        """Makes `name` a copy of the file at `path`."""
        self.put_all({name: path})

    def put_all(self, paths: Mapping[str, Path]) -> None:
        """The same for several, together where the store can."""

        def copy() -> None:
            for name, path in paths.items():
                with written_whole(Path(self._at(name))) as partial:
                    shutil.copyfile(path, partial)

        def send() -> None:
            self._files.put([str(path) for path in paths.values()], [self._at(name) for name in paths])

        if paths:
            self._asked(next(iter(paths)), copy if self._is_local else send)

    def get(self, name: str, path: Path) -> bool:
        """Copies the file to `path`, whose folder is there; False where there is none, and then `path` is left alone."""

        def get() -> bool:
            try:
                self._files.get_file(self._at(name), str(path))
            except FileNotFoundError:
                return False
            return True

        return self._asked(name, get)

    def get_all(self, paths: Mapping[str, Path]) -> None:
        """Copies files, together where the store can; folders are made. Raises TransientError where one is missing."""
        for path in paths.values():
            path.parent.mkdir(parents=True, exist_ok=True)
        if paths:
            sources, targets = [self._at(name) for name in paths], [str(path) for path in paths.values()]
            self._asked(next(iter(paths)), lambda: self._files.get(sources, targets))

    def names(self, prefix: str) -> list[str]:
        """Names, after `prefix/`, of all files below it; empty where there are none."""

        def find() -> list[str]:
            try:
                found = self._files.find(self._at(prefix))
            except FileNotFoundError:
                return []
            return sorted(str(path).removeprefix(f"{self._at(prefix)}/") for path in found)

        return self._asked(prefix, find)

    def remove(self, name: str) -> None:
        """Removes a file, or a folder with all below it; nothing happens where there is none."""

        def remove() -> None:
            try:
                self._files.rm(self._at(name), recursive=True)
            except FileNotFoundError:
                return

        self._asked(name, remove)

    def modified_s(self, name: str) -> float | None:
        """When the file was written, by the store's own clock, in seconds since 1970; None where there is none."""

        def look() -> float | None:
            try:
                return float(self._files.modified(self._at(name)).timestamp())
            except FileNotFoundError:
                return None

        return self._asked(name, look)

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _asked(self, name: str, action: Callable[[], T]) -> T:
        try:
            return action()
        except SlipwayError:
            raise
        except Exception as error:  # a library's edge: each file system raises its own kinds
            if not isinstance(error, OSError) and not _is_of_obstore(error):
                raise
            kind = type(error).__name__
            if isinstance(error, PermissionError) or kind in REFUSALS:
                raise ConfigError(
                    f"{self.url}/{name}: the store refuses this ({kind}: {_first_line(error)}). Check its keys and rights."
                ) from error
            raise TransientError(f"{self.url}/{name}: the store did not take this ({kind}: {_first_line(error)}). Run it again.") from error


def _is_of_obstore(error: Exception) -> bool:
    library: Any = sys.modules.get("obstore.exceptions")
    return library is not None and isinstance(error, library.BaseError)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:300]
