"""Follows a Dockerfile without an engine: its stages share one folder that stands for the root, its commands run in this machine's shell.

What is real: the lines themselves, the locks and their hashes, the venv, what is copied, variables, entry point. What is not: the base
image (this Python stands for it), packages of the system and users.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import dockerfile

OURS = re.compile(r"(?<![\w/.])/(opt|tmp|var/lib/slipway|usr/local/bin)\b")
OF_THE_SYSTEM = ("apt-get ", "groupadd ", "useradd ")


@dataclass
class Replay:
    """An image that was followed."""

    root: Path
    variables: dict[str, str] = field(default_factory=dict)
    entry_point: list[str] = field(default_factory=list)
    health_check: list[str] = field(default_factory=list)
    ran: list[str] = field(default_factory=list)

    def inside(self, text: str) -> str:
        """`text` with the paths of the image as they are here."""
        return OURS.sub(lambda found: f"{self.root}/{found[1]}", text)

    def environment(self) -> dict[str, str]:
        """What a program of the image sees: its own variables, and of this machine's those of pip and of certificates."""
        kept = {name: value for name, value in os.environ.items() if name.startswith("PIP_") or "CERT" in name or name.endswith("_proxy")}
        path = f"{self.root}/usr/local/bin:/usr/local/bin:/usr/bin:/bin"
        found = {"PATH": path, "HOME": str(self.root / "tmp"), "LANG": "C.UTF-8", **kept}
        for name, value in self.variables.items():
            found[name] = self.inside(value).replace("${PATH}", path)
        found.pop("PIP_NO_CACHE_DIR", None)  # what one image downloads, the next needs not
        return found | {"PIP_CACHE_DIR": str(Path.home() / ".cache" / "pip")}

    def run(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        """A command as a container of the image would run it."""
        folder = self.root / "var/lib/slipway"
        return subprocess.run(command, cwd=folder, env=self.environment(), capture_output=True, text=True, check=False)


def read(path: Path) -> list[dockerfile.Command]:
    """The instructions, by Docker's own parser."""
    return list(dockerfile.parse_file(str(path)))


def follow(path: Path, context: Path, root: Path) -> Replay:
    """Does what the file at `path` says, below `root`; fails where a command does."""
    image = Replay(root)
    for folder in ("opt", "tmp", "var/lib/slipway", "usr/local/bin"):
        (root / folder).mkdir(parents=True)
    (root / "usr/local/bin/python").symlink_to(Path(sys.base_prefix) / "bin" / f"python3.{sys.version_info.minor}")
    arguments: dict[str, str] = {}
    for command in read(path):
        words = [_expanded(word, arguments) for word in command.value]
        match command.cmd.lower():
            case "from":
                image.variables = {}
            case "arg":
                name, _, value = command.value[0].partition("=")
                arguments |= {name: value} if value else {}
            case "env":
                image.variables |= {name: value.strip('"') for name, value in zip(command.value[::2], command.value[1::2], strict=True)}
            case "copy":
                _copy(image, context, command.flags, words)
            case "run":
                _shell(image, words[0])
            case "entrypoint":
                image.entry_point = words
            case "healthcheck":
                image.health_check = words[1:]
    return image


def _expanded(word: str, arguments: dict[str, str]) -> str:
    return re.sub(r"\$\{(\w+)\}", lambda found: arguments.get(found[1], found[0]), word)


def _copy(image: Replay, context: Path, flags: tuple[str, ...], words: list[str]) -> None:
    *sources, target = words
    is_stage = any(flag.startswith("--from=") for flag in flags)
    for source in sources:
        origin = Path(image.inside(source)) if is_stage else context / source
        goal = Path(image.inside(target))
        if origin == goal:  # from one stage to the same place in another: they share the root
            continue
        if origin.is_dir():
            shutil.copytree(origin, goal, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"), symlinks=True)
        else:
            goal.mkdir(parents=True, exist_ok=True)
            shutil.copy(origin, goal)


def _shell(image: Replay, text: str) -> None:
    if text.startswith(OF_THE_SYSTEM):
        return
    done = image.run(["bash", "-o", "pipefail", "-c", image.inside(text)])
    image.ran.append(text)
    assert done.returncode == 0, f"{text}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
