"""How the replicas of a node leave before it does: `python -m serving.node --timeout-s 120`, run by the pod's `preStop`.

- Ray tells a replica nothing when its pod is deleted; without this its running answers end when the pod does.
- Each replica has a file in the node's folder. The program writes the word to drain beside them, and returns when they have gone: the
  replicas have told their fronts, which ask others from then on, and have finished what they had.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import sys
import time
from pathlib import Path

from infra.settings import load_settings

DRAIN_NAME = "drain"
SUFFIX = ".replica"
LOOK_S = 0.2


def node_dir() -> Path:
    """The folder of this node: below its home, and its own where nodes share one."""
    return load_settings().home / "nodes" / socket.gethostname()


class Standing:
    """One replica in the folder of its node."""

    def __init__(self, folder: Path, replica: str) -> None:
        self._word = folder / DRAIN_NAME
        self._file = folder / f"{replica.replace('/', '-').replace('#', '-')}{SUFFIX}"
        folder.mkdir(parents=True, exist_ok=True)
        self._file.write_text(str(os.getpid()), encoding="utf-8")

    @property
    def must_drain(self) -> bool:
        """Whether the node is about to go."""
        return self._word.exists()

    def leave(self) -> None:
        """Nothing runs here any more."""
        self._file.unlink(missing_ok=True)


def drain(folder: Path, timeout_s: float) -> int:
    """Gives the word, and returns when all replicas have left or the time is up: how many have not."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / DRAIN_NAME).touch()
    deadline_s = time.monotonic() + timeout_s
    while (num_left := sum(_is_alive(path) for path in folder.glob(f"*{SUFFIX}"))) and time.monotonic() < deadline_s:
        time.sleep(LOOK_S)
    return num_left


def _is_alive(file: Path) -> bool:
    """Whether the process that wrote the file still runs; one that was killed leaves its file."""
    with contextlib.suppress(OSError, ValueError):
        os.kill(int(file.read_text(encoding="utf-8")), 0)
        return True
    return False


def main(arguments: list[str] | None = None) -> int:
    """Drains this node; 0 where all replicas have left in time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--timeout-s", type=float, required=True, help="how long running answers may take")
    num_left = drain(node_dir(), parser.parse_args(arguments).timeout_s)
    if num_left:
        print(f"{num_left} replica(s) still had requests after the time given. Raise serve.drain_timeout_s.", file=sys.stderr)
    return 1 if num_left else 0


if __name__ == "__main__":
    sys.exit(main())
