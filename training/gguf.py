"""A Llama model in a GGUF file as config and 16-bit weights.

- The container is read here (a tenth of a second); `gguf` unpacks the quantized blocks; neither torch nor transformers is imported.
- transformers reads such files too, in half a minute, and with a wrong tokenizer (see training/gguf_tokenizer.py).
- A tensor or an architecture that is not known is refused, never guessed.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infra.errors import ConfigError
from training.weights import TensorSpec, safetensors_writer

MAGIC = b"GGUF"
STRING, ARRAY = 8, 9
# Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


@dataclass(frozen=True)
class GgufTensor:
    """Where one tensor lies: its ggml type, its shape (slowest dimension first) and its offset in the data section."""

    type_id: int
    shape: tuple[int, ...]
    offset_bytes: int


@dataclass(frozen=True)
class GgufFile:
    """The header of a GGUF file."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]
    data_start: int

    def get(self, key: str) -> Any:
        """A metadata value that must be there. Raises ConfigError."""
        if key not in self.metadata:
            raise ConfigError(f"{self.path}: no {key!r} in its metadata. A complete GGUF file of a chat model is needed; convert it again.")
        return self.metadata[key]


class _Cursor:
    """Reads values one after another."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self.position = 0

    def scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self._data, self.position)
        self.position += struct.calcsize("<" + code)
        return value

    def string(self) -> str:
        size = self.scalar("Q")
        raw = self._data[self.position : self.position + size]
        if len(raw) != size:
            raise ValueError("a text runs past the end of the file")
        self.position += size
        return raw.decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            return self.scalar(SCALARS[kind])
        item_kind, count = self.scalar("I"), self.scalar("Q")
        if item_kind in SCALARS:
            layout = f"<{count}{SCALARS[item_kind]}"
            values = list(struct.unpack_from(layout, self._data, self.position))
            self.position += struct.calcsize(layout)
            return values
        return [self.value(item_kind) for _ in range(count)]

    def tensor(self) -> tuple[str, GgufTensor]:
        name, num_dimensions = self.string(), self.scalar("I")
        shape = tuple(reversed([self.scalar("Q") for _ in range(num_dimensions)]))
        return name, GgufTensor(self.scalar("I"), shape, self.scalar("Q"))


def read_gguf(path: Path) -> GgufFile:
    """The header of the GGUF file at `path`. Raises ConfigError where it is not one."""
    try:
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if data[:4] != MAGIC or int.from_bytes(data[4:8], "little") not in (2, 3):
                raise ValueError(f"starts with {data[:8]!r}")
            cursor = _Cursor(data)
            cursor.position = 8
            num_tensors, num_values = cursor.scalar("Q"), cursor.scalar("Q")
            metadata = {cursor.string(): cursor.value(cursor.scalar("I")) for _ in range(num_values)}
            tensors = dict(cursor.tensor() for _ in range(num_tensors))
    except (ValueError, KeyError, OverflowError, MemoryError, struct.error) as error:
        raise ConfigError(f"{path}: not a whole GGUF file of version 2 or 3 ({error}). Fetch the model again.") from error
    alignment = int(metadata.get("general.alignment", 32))
    return GgufFile(path, metadata, tensors, -(-cursor.position // alignment) * alignment)


def llama_config(gguf: GgufFile) -> dict[str, Any]:
    """The config.json of a Llama model. Raises ConfigError for another architecture."""
    architecture = gguf.get("general.architecture")
    if architecture != "llama" or any(key.startswith("llama.rope.scaling") for key in gguf.metadata):
        raise ConfigError(
            f"{gguf.path}: architecture {architecture!r}, or a scaled rope; only plain llama is converted from GGUF. "
            "Name the same model as file: or hf: with safetensors."
        )
    hidden_size, num_heads = gguf.get("llama.embedding_length"), gguf.get("llama.attention.head_count")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "bos_token_id": gguf.get("tokenizer.ggml.bos_token_id"),
        "dtype": "bfloat16",
        "eos_token_id": gguf.get("tokenizer.ggml.eos_token_id"),
        "head_dim": gguf.metadata.get("llama.rope.dimension_count", hidden_size // num_heads),
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "intermediate_size": gguf.get("llama.feed_forward_length"),
        "max_position_embeddings": gguf.get("llama.context_length"),
        "mlp_bias": False,
        "num_attention_heads": num_heads,
        "num_hidden_layers": gguf.get("llama.block_count"),
        "num_key_value_heads": gguf.metadata.get("llama.attention.head_count_kv", num_heads),
        "pad_token_id": gguf.metadata.get("tokenizer.ggml.padding_token_id"),
        "rms_norm_eps": gguf.get("llama.attention.layer_norm_rms_epsilon"),
        "rope_theta": gguf.metadata.get("llama.rope.freq_base", 10000.0),
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
        "vocab_size": len(gguf.get("tokenizer.ggml.tokens")),
    }


def write_llama_weights(gguf: GgufFile, config: Mapping[str, Any], target: Path) -> None:
    """Every tensor, unpacked and rounded once to bf16, as one safetensors file."""
    names = {_new_name(gguf, name): name for name in gguf.tensors}
    specs = [TensorSpec(new, "BF16", gguf.tensors[old].shape) for new, old in sorted(names.items())]
    with safetensors_writer(target, specs, {"format": "pt"}) as writer:
        for new, values in _unpacked(gguf, {spec.name: names[spec.name] for spec in specs}):
            if new.endswith("q_proj.weight"):
                values = _half_split(values, config["num_attention_heads"])
            elif new.endswith("k_proj.weight"):
                values = _half_split(values, config["num_key_value_heads"])
            writer.write(new, to_bf16(values).data.cast("B"))


def to_bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Bits of the nearest bf16 values, ties to even; any shape."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounding = ((bits >> 16) & 1) + np.uint32(0x7FFF)
    return ((bits + rounding) >> 16).astype(np.uint16)


def _unpacked(gguf: GgufFile, names: Mapping[str, str]) -> Iterator[tuple[str, NDArray[np.float32]]]:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    data = np.memmap(gguf.path, dtype=np.uint8, mode="r")
    for new, old in names.items():
        tensor = gguf.tensors[old]
        try:
            kind = GGMLQuantizationType(tensor.type_id)
            block_values, block_bytes = GGML_QUANT_SIZES[kind]
            row_bytes = tensor.shape[-1] // block_values * block_bytes
            start = gguf.data_start + tensor.offset_bytes
            raw = data[start : start + int(np.prod(tensor.shape[:-1])) * row_bytes].reshape(*tensor.shape[:-1], row_bytes)
            values = np.asarray(dequantize(raw, kind), dtype=np.float32)
        except (ValueError, KeyError, NotImplementedError) as error:
            raise ConfigError(f"{gguf.path}: tensor {old!r} cannot be unpacked ({error}). Use safetensors instead.") from error
        if not np.isfinite(values).all():
            raise ConfigError(f"{gguf.path}: tensor {old!r} holds values that are not finite. Fetch the model again.")
        yield new, values


def _new_name(gguf: GgufFile, name: str) -> str:
    parts = name.split(".")
    if len(parts) == 2 and parts[0] in TOP_NAMES and parts[1] == "weight":
        return f"{TOP_NAMES[parts[0]]}.weight"
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in LAYER_NAMES and parts[3] == "weight":
        return f"model.layers.{int(parts[1])}.{LAYER_NAMES[parts[2]]}.weight"
    raise ConfigError(f"{gguf.path}: tensor {name!r} is not of a plain Llama model. Name the same model as file: or hf: with safetensors.")


def _half_split(values: NDArray[np.float32], num_heads: int) -> NDArray[np.float32]:
    """Rotary rows from llama.cpp's interleaved order back to the two halves that transformers rotates; (heads * head_dim, hidden).

    Source: llama.cpp convert_hf_to_gguf.py, `LlamaModel.permute`, of which this is the inverse.
    """
    half = values.shape[0] // num_heads // 2
    return values.reshape(num_heads, half, 2, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
