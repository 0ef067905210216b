"""How the weights of a quantized model are stored, read from its own files and held against its manifest; light: no engine is loaded.

A group size or a number of bits that is another than the manifest says is found here, before anything answers with it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from infra.contracts import Manifest, WeightFacts
from infra.errors import ArtifactError

OPENVINO_NAME = "openvino_model.xml"
BNB_STATE = ".quant_state.bitsandbytes__"
MODE_OF_TYPE = {"u4": "int4_asym", "i4": "int4_sym", "u8": "int8_asym", "i8": "int8_sym", "f16": "f16", "bf16": "bf16", "f32": "f32"}
MODE_OF_DTYPE = {"BF16": "bf16", "F16": "f16", "F32": "f32"}
"""Of safetensors, for weights that were not quantized."""
PACKED_TYPES = ("u4", "i4", "u8", "i8")
INT4_MODES = ("int4_asym", "int4_sym", "nf4")
Matrix = tuple[str, int | None]
"""Kind of number, and how many of a row share one scale; None for the whole row."""


def check_weights(folder: Path, manifest: Manifest) -> None:
    """Raises ArtifactError where the weights in a quantized model's files are not those that its manifest tells of."""
    told = manifest.model.weights if manifest.model else None
    if told is None:
        return
    found = _reader(folder, told)(folder)
    if (found.mode, found.group_size, found.int4_share) != (told.mode, told.group_size, told.int4_share):
        raise ArtifactError(
            f"{folder}: its weights are {describe(found)}; the manifest says {describe(told)}. Run the step that quantizes it again."
        )


def _reader(folder: Path, told: WeightFacts) -> Callable[[Path], WeightFacts]:
    if (folder / OPENVINO_NAME).is_file():
        return read_openvino_weights
    return read_plain_weights if told.mode in MODE_OF_DTYPE.values() else read_bnb_weights


def describe(weights: WeightFacts) -> str:
    """The facts in words."""
    groups = f" in groups of {weights.group_size}" if weights.group_size else ""
    share = f", {weights.int4_share:.1%} of them in 4 bits" if weights.int4_share else ""
    return f"{weights.mode}{groups}{share}"


def read_openvino_weights(folder: Path) -> WeightFacts:
    """The weights of an OpenVINO model, by the shapes of its constants. Raises ArtifactError where NNCF's own record says otherwise."""
    path = folder / OPENVINO_NAME
    numbers: Counter[Matrix] = Counter()
    recorded: dict[str, str] = {}
    try:
        for _, element in ElementTree.iterparse(path):
            if element.tag == "layer":
                if element.get("type") == "Const" and (found := _matrix(element)):
                    numbers[found[0]] += found[1]
                element.clear()
            elif element.tag == "weight_compression":
                recorded = {option.tag: option.get("value", "") for option in element}
    except (OSError, ElementTree.ParseError) as error:
        raise ArtifactError(f"{path}: not readable as an OpenVINO model ({error}). Run the quantize step again.") from error
    weights = _facts(numbers, path)
    if recorded and (recorded["mode"], int(recorded["group_size"])) != (weights.mode, weights.group_size or -1):
        raise ArtifactError(
            f"{path}: its weights are {describe(weights)}; NNCF recorded mode {recorded['mode']} with group size {recorded['group_size']}. "
            "Run the quantize step again."
        )
    return weights


def _matrix(layer: ElementTree.Element) -> tuple[Matrix, int] | None:
    """A constant that is a weight matrix, and how many numbers it holds; scales, zero points and norms are none."""
    data = layer.find("data")
    assert data is not None
    kind, shape = data.get("element_type", ""), [int(size) for size in data.get("shape", "").split(",") if size.strip()]
    if kind not in MODE_OF_TYPE or len(shape) < 2 or shape[-1] == 1:
        return None
    if kind in PACKED_TYPES:
        return (kind, shape[-1] if len(shape) > 2 else None), prod(shape)
    return ((kind, None), prod(shape)) if len(shape) == 2 and shape[0] > 1 else None


def _facts(numbers: Counter[Matrix], path: Path) -> WeightFacts:
    """Counts of numbers by kind as facts. Raises ArtifactError where groups of several sizes are mixed, or there is no matrix."""
    grouped = sorted({group for kind, group in numbers if group and kind in PACKED_TYPES})
    if not numbers or len(grouped) > 1:
        raise ArtifactError(f"{path}: weights in groups of {grouped} were found; one size is needed. Run the quantize step again.")
    num_int4 = sum(count for (kind, _), count in numbers.items() if MODE_OF_TYPE[kind] in INT4_MODES)
    four_bits = [MODE_OF_TYPE[kind] for kind, _ in numbers if MODE_OF_TYPE[kind] in INT4_MODES]
    mode = four_bits[0] if four_bits else MODE_OF_TYPE[numbers.most_common(1)[0][0][0]]
    return WeightFacts(mode=mode, group_size=grouped[0] if grouped else None, int4_share=round(num_int4 / numbers.total(), 4))


def read_bnb_weights(folder: Path) -> WeightFacts:
    """The weights of a folder that bitsandbytes quantized, by the tensors of its files. Raises ArtifactError where there are none."""
    kinds: Counter[tuple[str, int | None]] = Counter()
    num_numbers: Counter[bool] = Counter()
    for name, stream in _tensors(folder):
        if name.endswith(".SCB"):
            kinds["int8_sym", None] += 1
        elif BNB_STATE in name:
            state = json.loads(bytes(stream.get_tensor(name)))
            kinds[state["quant_type"], state["blocksize"]] += 1
        elif name.endswith(".weight"):
            tensor = stream.get_slice(name)
            is_packed = tensor.get_dtype() == "U8"
            num_numbers[is_packed] += prod(tensor.get_shape()) * (2 if is_packed else 1)
    if len(kinds) != 1:
        raise ArtifactError(f"{folder}: weights by bitsandbytes as {sorted(kinds)} were found; one kind is needed. Quantize it again.")
    ((mode, group_size),) = kinds
    return WeightFacts(mode=mode, group_size=group_size, int4_share=round(num_numbers[True] / num_numbers.total(), 4))


def read_plain_weights(folder: Path) -> WeightFacts:
    """The weights of a folder that nothing was quantized in, by its matrices. Raises ArtifactError on numbers of another kind."""
    numbers: Counter[str] = Counter()
    for name, stream in _tensors(folder):
        tensor = stream.get_slice(name)
        if len(tensor.get_shape()) > 1:
            numbers[tensor.get_dtype()] += prod(tensor.get_shape())
    if not numbers or (odd := sorted(set(numbers) - set(MODE_OF_DTYPE))):
        found = f"matrices of {', '.join(odd)}" if numbers else "no matrix"
        raise ArtifactError(f"{folder}: {found} found; plain weights in safetensors are needed. Run the step that makes it again.")
    return WeightFacts(mode=MODE_OF_DTYPE[numbers.most_common(1)[0][0]])


def _tensors(folder: Path) -> Iterator[tuple[str, Any]]:
    """The name of each tensor of a folder, with the open file that holds it."""
    for path in sorted(folder.glob("*.safetensors")):
        with _opened(path) as stream:
            for name in stream.keys():  # noqa: SIM118 - it is no mapping
                yield name, stream


def _opened(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="np")
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{path}: not readable as safetensors ({error}). Run the quantize step again.") from error
