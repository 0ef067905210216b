"""Where an artifact came from: commit, versions, run."""

from __future__ import annotations

import platform
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path

from pydantic import Field

from infra.config import Config

# The packages whose version can change a number we report.
TRACKED_PACKAGES = ("torch", "transformers", "peft", "ray", "mlflow", "openvino", "openvino-genai", "optimum-intel", "nncf", "tokenizers")


class Provenance(Config):
    """Facts about the making of an artifact; never part of its identity."""

    git_commit: str | None = None
    """Commit of this source tree, with `-dirty` appended when files differ from it; None outside a checkout."""
    spec_fingerprint: str | None = None
    mlflow_run_id: str | None = None
    versions: dict[str, str] = Field(default_factory=dict)


def capture(spec_fingerprint: str | None = None, mlflow_run_id: str | None = None) -> Provenance:
    """The provenance of what this process is about to make."""
    return Provenance(
        git_commit=git_commit(), spec_fingerprint=spec_fingerprint, mlflow_run_id=mlflow_run_id, versions=installed_versions()
    )


@cache
def installed_versions() -> dict[str, str]:
    """Versions of Python and of those tracked packages that are installed, read without importing them."""
    versions = {"python": platform.python_version()}
    for name in TRACKED_PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


@cache
def git_commit() -> str | None:
    """The commit this source tree is at, or None where git or a checkout is absent."""
    root = Path(__file__).resolve().parent.parent
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=root,
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip() or None
