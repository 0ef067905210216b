"""What goes wrong with the merged and the quantized model, and with what lies beside their weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from infra.files import read_json, write_json_atomic
from tests.faults.data_faults import edit_manifest
from tests.faults.toy_run import Fault, Place

WEIGHTS, OPENVINO_WEIGHTS = "model.safetensors", "openvino_model.bin"
INT8, INT4 = "quantize-openvino-int8", "quantize-openvino-int4"
Weights = dict[str, Tensor]


def _reweighted(change: Callable[[Weights, Mapping[str, Tensor]], None]) -> Callable[[Place], None]:
    """Harm that changes the merged weights, given the base's."""

    def harm(place: Place) -> None:
        merged, base = load_file(place.folder / WEIGHTS), load_file(place.inputs["base"].path / WEIGHTS)
        change(merged, base)
        save_file(merged, place.folder / WEIGHTS, metadata={"format": "pt"})

    return harm


def _twice(merged: Weights, base: Mapping[str, Tensor]) -> None:
    for name, weight in merged.items():
        merged[name] = (2 * weight.float() - base[name].float()).to(weight.dtype)


def _not_loaded(merged: Weights, base: Mapping[str, Tensor]) -> None:
    merged.update(base)


def _skip_layer(merged: Weights, base: Mapping[str, Tensor]) -> None:
    merged.update({name: weight for name, weight in base.items() if ".layers.1." in name})


def _into_4_bits(merged: Weights, base: Mapping[str, Tensor]) -> None:
    """The adapter added to the base as NF4 stores it, the way of many a recipe."""
    from bitsandbytes import functional

    for name, weight in base.items():
        if not torch.equal(weight, merged[name]):
            stored, state = functional.quantize_4bit(weight.float(), quant_type="nf4")
            update = merged[name].float() - weight.float()
            merged[name] = (functional.dequantize_4bit(stored, state) + update).to(weight.dtype)


def _swap_layers(merged: Weights, base: Mapping[str, Tensor]) -> None:
    for name in [name for name in merged if ".layers.0." in name]:
        other = name.replace(".layers.0.", ".layers.1.")
        merged[name], merged[other] = merged[other].clone(), merged[name].clone()


def _untie(place: Place) -> None:
    merged = load_file(place.folder / WEIGHTS)
    head = merged["model.embed_tokens.weight"].clone()
    head[:2] = 0
    save_file({**merged, "lm_head.weight": head}, place.folder / WEIGHTS, metadata={"format": "pt"})
    _reconfigure(place.folder, tie_word_embeddings=False)


def _reconfigure(folder: Path, **keys: Any) -> None:
    write_json_atomic(folder / "config.json", {**read_json(folder / "config.json"), **keys})


def _lose_rope_scaling(place: Place) -> None:
    told = read_json(place.folder / "config.json")
    told.pop("rope_scaling", None)
    told["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0}
    write_json_atomic(place.folder / "config.json", told)


def _cut_context(place: Place) -> None:
    """In the folder and in its manifest, as an exporter does that takes a default for the model's own."""
    _reconfigure(place.folder, max_position_embeddings=128)
    edit_manifest(place.folder, context_tokens=128)


def _edit_template(place: Place) -> None:
    path = place.folder / "chat_template.jinja"
    path.write_text(path.read_text().replace("<|im_end|>", " <|im_end|>"))


def _template_without_bos(place: Place) -> None:
    """The template of a tokenizer that is thought to add the BOS itself, which none of ours does."""
    path = place.folder / "chat_template.jinja"
    path.write_text(
        path.read_text().replace("'<|im_start|>' + message['role']", "('' if loop.first else '<|im_start|>') + message['role']")
    )


def _template_with_bos(place: Place) -> None:
    path = place.folder / "chat_template.jinja"
    path.write_text("{{ bos_token }}" + path.read_text())


def _add_token(place: Place) -> None:
    path = place.folder / "tokenizer.json"
    told = json.loads(path.read_text())
    told["added_tokens"].append({**told["added_tokens"][0], "id": 400, "content": "lamp", "special": False})
    path.write_text(json.dumps(told))


def _other_stops(place: Place) -> None:
    """In all files that a server could read, so that nothing in the folder contradicts it."""
    _reconfigure(place.folder, eos_token_id=7)
    path = place.folder / "generation_config.json"
    write_json_atomic(path, {**(read_json(path) if path.is_file() else {}), "eos_token_id": 7})
    edit_manifest(place.folder, stop_ids=[7])


def _truncate(name: str) -> Callable[[Place], None]:
    def harm(place: Place) -> None:
        path = place.folder / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return harm


def _swap_file(step: str, name: str) -> Callable[[Place], None]:
    def harm(place: Place) -> None:
        shutil.copyfile(place.foreign_artifact(step) / name, place.folder / name)

    return harm


def _stale(step: str) -> Callable[[Place], None]:
    def harm(place: Place) -> None:
        shutil.rmtree(place.folder)
        shutil.copytree(place.foreign_artifact(step), place.folder)

    return harm


def _coarser_groups(place: Place) -> None:
    """Quantized again in groups of 32, and the manifest as if nothing had been."""
    from serving.formats import FormatConfig, QuantizeJob
    from serving.quantize.openvino import quantize

    other = place.folder.parent / "other-groups"
    job = QuantizeJob(
        output_dir=other,
        merged_dir=place.inputs["merge"].path,
        quantize=FormatConfig(format="openvino-int4", group_size=32, int4_share=0.8),
    )
    quantize(job)
    shutil.rmtree(place.folder)
    shutil.move(other, place.folder)


def _edit_manifest(place: Place) -> None:
    """A digest made to fit another file is what a signature is for; here the file stays and its digest is another."""
    path = place.folder / "manifest.json"
    told = read_json(path)
    entry = told["files"][OPENVINO_WEIGHTS]
    entry["sha256"] = entry["sha256"][::-1]
    write_json_atomic(path, told)


FAULTS = (
    Fault("wrong scaling in the merge", "merge", _reweighted(_twice), "scale 8 instead of 4: wrong alpha or rank"),
    Fault("adapter not loaded by the merge", "merge", _reweighted(_not_loaded), "it is the base: the adapter was not loaded or not merged"),
    Fault("layer skipped in the merge", "merge", _reweighted(_skip_layer), r"layers\.1\..*this layer was skipped"),
    Fault("merged into the 4-bit base", "merge", _reweighted(_into_4_bits), "16-bit ones, such as quantized ones"),
    Fault("layers swapped", "merge", _reweighted(_swap_layers), "differs from the base's|merged into other weights"),
    Fault("tied embeddings untied", "merge", _untie, "embeddings that were tied are no longer"),
    Fault("tokenizer with one added token", "merge", _add_token, "the tokenizer of merged differs"),
    Fault("rope scaling lost", "merge", _lose_rope_scaling, "rope"),
    Fault("truncated shard", "merge", _truncate(WEIGHTS), f"{WEIGHTS}: sha256 is", is_noticed=True),
    Fault("swapped shard", "merge", _swap_file("merge", WEIGHTS), f"{WEIGHTS}: sha256 is", is_noticed=True),
    Fault(
        "swapped shard that the manifest knows",
        "merge",
        _swap_file("merge", WEIGHTS),
        "another run's|other weights than the base's|differs from the base's",
    ),
    Fault("edited chat template", INT8, _edit_template, "the chat template of openvino-int8 differs"),
    Fault("missing BOS in the template", INT8, _template_without_bos, "a BOS is missing"),
    Fault("double BOS in the template", INT8, _template_with_bos, "a BOS was added twice"),
    Fault("context length cut", INT8, _cut_context, "context_tokens is 128, the base has 256"),
    Fault("wrong stop ids at the server", INT8, _other_stops, "other stop ids at the server", asks_live=True),
    Fault("stale quantized model of another run", INT8, _stale(INT8), "stale, or of another run"),
    Fault("INT4 in other groups", INT4, _coarser_groups, "groups of 32, 64 is needed"),
    Fault("manifest edited", INT8, _edit_manifest, f"{OPENVINO_WEIGHTS}: sha256 is .* the manifest says", is_noticed=True),
    Fault(
        "answers of another model",
        "predict-openvino-int8",
        _stale("predict-openvino-int8"),
        "its answers were made of the model .*stale, or of another run",
    ),
)
