"""What goes wrong with rows, labels and the trained adapter."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy
import torch
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file

from infra.files import read_json, write_json_atomic
from tests.faults.toy_run import Fault, Place

Labels = Callable[[numpy.ndarray, numpy.ndarray], None]
TOKENS, ADAPTER = "train.safetensors", "adapter_model.safetensors"


def _relabelled(change: Labels) -> Callable[[Place], None]:
    """Harm that changes ids (n,) and labels (n,) of each training row in place."""

    def harm(place: Place) -> None:
        found = {name: array.copy() for name, array in load_arrays(place.folder / TOKENS).items()}
        offsets = found["offsets"]
        for start, end in itertools.pairwise(offsets):
            change(found["ids"][start:end], found["supervised"][start:end])
        save_arrays(found, place.folder / TOKENS)

    return harm


def _forget_stop(ids: numpy.ndarray, labels: numpy.ndarray) -> None:
    labels[numpy.flatnonzero(labels)[-1]] = 0


def _learn_prompt(ids: numpy.ndarray, labels: numpy.ndarray) -> None:
    labels[:] = 1


def _second_bos(place: Place) -> None:
    """As a tokenizer does that adds a BOS before a template that begins with one."""
    found = load_arrays(place.folder / TOKENS)
    offsets, rows = found["offsets"], range(len(found["rows"]))
    spans = [slice(offsets[row], offsets[row + 1]) for row in rows]
    ids = [numpy.concatenate([found["ids"][span][:1], found["ids"][span]]) for span in spans]
    labels = [numpy.concatenate([[numpy.uint8(0)], found["supervised"][span]]) for span in spans]
    lengths = numpy.cumsum([0, *map(len, ids)])
    made = {"ids": numpy.concatenate(ids), "supervised": numpy.concatenate(labels), "offsets": lengths, "rows": found["rows"]}
    save_arrays({name: array.astype(found[name].dtype) for name, array in made.items()}, place.folder / TOKENS)


def _without_first(place: Place) -> None:
    """As a template does that leaves the BOS to a tokenizer that adds none: every prompt lacks its first token."""
    path = place.folder / "prompts.jsonl"
    prompts = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({**prompt, "ids": prompt["ids"][1:]}) + "\n" for prompt in prompts))


def _shuffle_labels(place: Place) -> None:
    """Each row's tokens under the number of another row: the answers belong to other questions."""
    found = load_arrays(place.folder / TOKENS)
    found["rows"] = numpy.roll(found["rows"], 1)
    save_arrays(found, place.folder / TOKENS)


def _leak(place: Place) -> None:
    with (place.folder / "train.jsonl").open("a") as train:
        train.write((place.folder / "heldout.jsonl").read_text().splitlines()[1] + "\n")


def _foreign_adapter(place: Place) -> None:
    shutil.rmtree(place.folder)
    shutil.copytree(place.foreign_artifact("train"), place.folder)


def _untrained(place: Place) -> None:
    path = place.folder / ADAPTER
    save_file({name: torch.zeros_like(weight) for name, weight in load_file(path).items()}, path, metadata={"format": "pt"})


def _other_alpha(place: Place) -> None:
    """In the adapter's own file and in its manifest, as one run's settings in another run's folder."""
    path = place.folder / "adapter_config.json"
    write_json_atomic(path, {**read_json(path), "lora_alpha": 2 * read_json(path)["lora_alpha"]})
    manifest = place.folder / "manifest.json"
    told = read_json(manifest)
    told["model"]["adapter"]["alpha"] *= 2
    write_json_atomic(manifest, told)


def _broken_numbers(place: Place) -> None:
    path = place.folder / ADAPTER
    weights = load_file(path)
    name = sorted(weights)[0]
    weights[name] = torch.full_like(weights[name], float("nan"))
    save_file(weights, path, metadata={"format": "pt"})


def edit_manifest(folder: Path, **facts: object) -> None:
    """Other facts of the model in a folder's manifest."""
    path = folder / "manifest.json"
    told = read_json(path)
    told["model"].update(facts)
    write_json_atomic(path, told)


FAULTS = (
    Fault("stop token never supervised", "render", _relabelled(_forget_stop), "stop token .* has no label"),
    Fault("prompt tokens supervised", "render", _relabelled(_learn_prompt), "tokens of the prompt are learnt"),
    Fault("double BOS in training", "render", _second_bos, "token ids differ from the template's own .* BOS"),
    Fault("missing BOS in the prompts", "render", _without_first, "one token more.*BOS|BOS is missing|BOS was added"),
    Fault("labels shuffled", "render", _shuffle_labels, "token ids differ from the template's own .* other row"),
    Fault("training row leaked into the held-out rows", "rows", _leak, "held-out row 1 is training row"),
    Fault("adapter for another base", "train", _foreign_adapter, "trained on the base model|not an adapter of the model"),
    Fault("adapter that changes nothing", "train", _untrained, "adapter was not loaded, or training changed nothing"),
    Fault("wrong alpha", "train", _other_alpha, "alpha is 64.0 in its manifest, the spec says 32.0"),
    Fault("weights that are not numbers", "train", _broken_numbers, "not finite"),
)
