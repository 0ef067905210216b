"""What this machine has of what Slipway needs."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass
from importlib import metadata

import psutil

from infra.settings import Settings

PACKAGES_BY_EXTRA = {
    "train": ("torch", "transformers", "peft", "ray", "gguf"),
    "quantize": ("optimum-intel", "nncf", "openvino"),
    "serve": ("openvino-genai", "ray", "fastapi", "prometheus-client"),
    "registry": ("mlflow",),
}
MIN_FREE_BYTES = 4 << 30
MIN_MEMORY_BYTES = 4 << 30


@dataclass(frozen=True)
class Check:
    """One fact of this machine."""

    name: str
    passed: bool
    found: str


def inspect(settings: Settings) -> list[Check]:
    """Every check, none of which changes anything."""
    return [_python(), *(_extra(extra, names) for extra, names in PACKAGES_BY_EXTRA.items()), _machine(), _disk(settings), _store(settings)]


def _python() -> Check:
    version = ".".join(str(part) for part in sys.version_info[:3])
    return Check("python", sys.version_info >= (3, 11), f"{version}, 3.11 or newer is needed")


def _extra(extra: str, names: tuple[str, ...]) -> Check:
    missing, found = [], []
    for name in names:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        return Check(f"extra {extra}", False, f"without {', '.join(missing)}: pip install 'slipway-ml[{extra}]'")
    return Check(f"extra {extra}", True, ", ".join(found))


def _machine() -> Check:
    memory_bytes = psutil.virtual_memory().available
    text = f"{os.cpu_count()} cores, {memory_bytes / 1e9:.1f} GB of memory free"
    return Check("machine", memory_bytes >= MIN_MEMORY_BYTES, text)


def _disk(settings: Settings) -> Check:
    folder = settings.home
    while not folder.exists():
        folder = folder.parent
    free_bytes = shutil.disk_usage(folder).free
    return Check("disk", free_bytes >= MIN_FREE_BYTES, f"{free_bytes / 1e9:.1f} GB free for {settings.home}")


def _store(settings: Settings) -> Check:
    is_local = settings.tracking_uri == f"sqlite:///{settings.home / 'mlflow.db'}"
    found = "MLflow in sqlite, in the home folder" if is_local else f"MLflow at {settings.tracking_uri} (MLFLOW_TRACKING_URI)"
    files = "" if settings.run_files_root is None else f", files of runs in {settings.run_files_root}"
    return Check("tracking", True, found + files)
