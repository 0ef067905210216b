"""The errors Slipway raises on purpose, sorted by what the caller can do about them.

SlipwayError
├── ConfigError        exit 2: change the spec, the data or the command line
├── ArtifactError      exit 2: the files are not what their manifest says; rebuild or restore them
├── RegistryError      exit 2: the model registry has no such name, version or alias
├── GateFailed         exit 3: a gate refused the model; the report says by how much
└── TransientError     exit 75: the same command may work later (a lock, a port, a lost worker)

Every message reads: what was found, what was needed, what to do next. Only `TransientError` is ever retried.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
EXIT_DONE = 0
EXIT_INTERRUPTED = 130


class SlipwayError(Exception):
    """Base of every error raised on purpose; carries one message and an exit code."""

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message

    def __reduce__(self) -> tuple[type[SlipwayError], tuple[str]]:
        return type(self), (self.message,)


class ConfigError(SlipwayError):
    """The input is wrong: spec, data, command line."""

    exit_code = 2


class ArtifactError(SlipwayError):
    """An artifact is absent, incomplete or not what its manifest says."""

    exit_code = 2


class RegistryError(SlipwayError):
    """The registry has no such model, version or alias."""

    exit_code = 2


class GateFailed(SlipwayError):
    """A gate refused the model."""

    exit_code = 3


class TransientError(SlipwayError):
    """The same command may succeed later."""

    exit_code = 75


def attempted(action: Callable[[], T], problems: list[str]) -> T | None:
    """What the action gives; None where it raised ConfigError, whose message is then one more of the problems."""
    try:
        return action()
    except ConfigError as error:
        problems.append(error.message)
        return None


BY_NAME: dict[str, type[SlipwayError]] = {
    error.__name__: error for error in (ConfigError, ArtifactError, RegistryError, GateFailed, TransientError)
}
