"""Text that is written by a program into a file that people write."""

from __future__ import annotations

from infra.errors import ConfigError


def placed(text: str, begins: str, ends: str, content: str, what: str) -> str:
    """`text` with `content` between its two marks. Raises ConfigError, naming `what` is placed, where it lacks them."""
    before, found, rest = text.partition(begins)
    _, closed, after = rest.partition(ends)
    if not (found and closed):
        raise ConfigError(f"no place for {what}: write {begins.strip()} and {ends} into the file.")
    return f"{before}{begins}\n{content}\n{ends}{after}"
