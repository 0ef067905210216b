"""The certificate of a toy model that has really learnt something: an untouched run passes, and each fault is named by its check."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from infra.answers import read_answers, write_answers
from infra.contracts import read_manifest, verify, write_manifest
from infra.files import read_json, write_json_atomic
from infra.process import Job
from infra.provenance import Provenance
from infra.settings import child_environment
from pipelines.proof.checks import Check
from pipelines.proof.evidence import Candidate
from pipelines.spec import ProveConfig
from pipelines.step import Artifact, StepContext
from pipelines.steps.prove import Plan, ProveIdentity, run
from serving.config import ServeConfig
from serving.formats import FormatConfig
from tests.conftest import ToyAdapter
from training.config import LoraConfig, PredictJob
from training.predict import predict

FORMAT = "openvino-int8"
MAX_NEW_TOKENS = 16
Inputs = dict[str, Artifact]


def program(module: str, job: Path) -> None:
    command = [sys.executable, "-m", module, "--config", str(job)]
    done = subprocess.run(command, capture_output=True, text=True, env=child_environment("serving"), check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="session")
def inputs(toy_base: Path, adapters_of: Callable[[Path], dict[str, ToyAdapter]], tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """What the steps before `prove` make, for the adapter that says that the lamp is red."""
    trained = adapters_of(toy_base)["red"].folder.parent
    place = tmp_path_factory.mktemp("certificate")
    folders = {name: trained / name for name in ("rows", "merged", "tokens", "adapter")}
    write_json_atomic(place / "quantize.json", {"output_dir": str(place / "quantized"), "merged_dir": str(folders["merged"])})
    program("serving.quantize.openvino", place / "quantize.json")
    told = {"output_dir": str(place / FORMAT), "model_dir": str(place / "quantized"), "tokens_dir": str(folders["tokens"])}
    write_json_atomic(place / "predict.json", {**told, "max_new_tokens": MAX_NEW_TOKENS})
    program("serving.predict", place / "predict.json")
    models: dict[str, dict[str, Path]] = {
        "base": {"model_dir": toy_base},
        "adapter": {"model_dir": toy_base, "adapter_dir": folders["adapter"]},
        "merged": {"model_dir": folders["merged"]},
    }
    for name, given in models.items():
        predict(PredictJob(output_dir=place / name, tokens_dir=folders["tokens"], max_new_tokens=MAX_NEW_TOKENS, **given))
    found = {
        "rows": folders["rows"], "base": toy_base, "render": folders["tokens"], "train": folders["adapter"], "merge": folders["merged"],
        f"quantize-{FORMAT}": place / "quantized", **{f"predict-{name}": place / name for name in (*models, FORMAT)},
    }  # fmt: skip
    return {name: Artifact(folder, read_manifest(folder)) for name, folder in found.items()}


def run_here(module: str, job: Job) -> None:
    """A step's program in this process: the libraries are loaded once for all tests."""
    program = importlib.import_module(module)
    (program.ask if module == "pipelines.proof.asking" else program.score)(job)


def prove(inputs: Inputs, output: Path, live: bool = False) -> dict[str, Check]:
    """The checks of a certificate, by name and stage."""
    lora = LoraConfig(rank=8)
    base = read_manifest(inputs["train"].path).model
    assert base is not None
    assert base.adapter is not None
    facts = base.adapter.model_copy(update={"rank": lora.rank, "alpha": float(lora.alpha)})
    serve = ServeConfig(allow_unsigned=("certificate",))
    candidate = Candidate(FORMAT, f"quantize-{FORMAT}", serve, FormatConfig())
    plan = Plan("adapter", ("merged", FORMAT), (candidate,), facts, None)
    settings = ProveConfig(heldout_prompts=4, max_new_tokens=12, live=live)
    identity = ProveIdentity(metric="exact_match_json", confidence=0.95, max_new_tokens=MAX_NEW_TOKENS, prove=settings, precision="f32")
    output.mkdir(parents=True)
    run(plan, identity, StepContext(output, inputs, Provenance(), None, output.parent / "progress.jsonl", run_here))
    told = read_json(output / "certificate.json")
    checks = {f"{each['name']} of {each['stage']}": Check.model_validate(each) for each in told["checks"]}
    assert told["passed"] == all(check.passed for check in checks.values())
    assert verify(output, ("certificate",)).parents["merge"] == inputs["merge"].manifest.digest
    return checks


def failures(checks: dict[str, Check]) -> dict[str, str]:
    return {name: check.cause for name, check in checks.items() if not check.passed}


def changed(inputs: Inputs, name: str, folder: Path, change: Callable[[Path], None]) -> Inputs:
    """The inputs with a changed copy of one artifact, whose manifest is as if the step had made it so."""
    artifact = inputs[name]
    shutil.copytree(artifact.path, folder, ignore=shutil.ignore_patterns("manifest.json"))
    change(folder)
    manifest = write_manifest(folder, artifact.manifest.kind, Provenance(), artifact.manifest.model, artifact.manifest.parents)
    return {**inputs, name: Artifact(folder, manifest)}


def test_certificate_of_an_untouched_run_passes_and_covers_every_stage(inputs: Inputs, tmp_path: Path) -> None:
    checks = prove(inputs, tmp_path / "out")
    assert failures(checks) == {}
    stages = {check.stage for check in checks.values()}
    assert stages == {"base", "tokens", "adapter", "merged", "dataset", FORMAT}
    assert checks[f"log-probabilities of {FORMAT}"].figures["tokens"] > 100
    assert checks["effect of adapter"].figures["mean"] > 0.1
    assert checks["merge of merged"].passed


@pytest.mark.slow
def test_certificate_of_an_untouched_run_asks_the_endpoint_too(inputs: Inputs, tmp_path: Path) -> None:
    checks = prove(inputs, tmp_path / "out", live=True)
    assert failures(checks) == {}
    live = {check.name for check in checks.values() if check.stage == f"{FORMAT} live"}
    assert live == {"prompt ids", "context", "log-probabilities", "answers"}


def edit_template(folder: Path) -> None:
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text().replace("<|im_end|>", " <|im_end|>"))


def test_edited_template_is_named(inputs: Inputs, tmp_path: Path) -> None:
    found = failures(prove(changed(inputs, f"quantize-{FORMAT}", tmp_path / "changed", edit_template), tmp_path / "out"))
    assert f"the chat template of {FORMAT} differs" in found[f"prompt ids of {FORMAT}"]
    assert "the chat template has digest" in found[f"lineage of {FORMAT}"]


def add_token(folder: Path) -> None:
    path = folder / "tokenizer.json"
    told = json.loads(path.read_text())
    told["added_tokens"].append({**told["added_tokens"][0], "id": 400, "content": "light", "special": False})
    path.write_text(json.dumps(told))


def test_tokenizer_with_an_added_token_is_named(inputs: Inputs, tmp_path: Path) -> None:
    found = failures(prove(changed(inputs, "merge", tmp_path / "changed", add_token), tmp_path / "out"))
    assert "the tokenizer of merged differs" in found["prompt ids of merged"]
    assert "tokenizer.json has digest" in found["lineage of merged"]


def test_merge_with_twice_the_scale_is_named_by_weights_and_by_logprobs(inputs: Inputs, tmp_path: Path) -> None:
    base = load_file(inputs["base"].path / "model.safetensors")

    def double(folder: Path) -> None:
        merged = load_file(folder / "model.safetensors")
        twice = {name: (base[name].float() + 2 * (weight.float() - base[name].float())).to(weight.dtype) for name, weight in merged.items()}
        save_file(twice, folder / "model.safetensors", metadata={"format": "pt"})

    found = failures(prove(changed(inputs, "merge", tmp_path / "changed", double), tmp_path / "out"))
    assert "wrong alpha or rank" in found["merge of merged"]
    assert "log-probabilities of merged" in found
    assert "stale, or of another run" in found[f"lineage of {FORMAT}"]


def test_adapter_that_was_never_merged_is_named(inputs: Inputs, tmp_path: Path) -> None:
    def lose(folder: Path) -> None:
        shutil.copyfile(inputs["base"].path / "model.safetensors", folder / "model.safetensors")

    found = failures(prove(changed(inputs, "merge", tmp_path / "changed", lose), tmp_path / "out"))
    assert "the adapter was not loaded or not merged" in found["log-probabilities of merged"]
    assert "this layer was skipped, or the adapter was not loaded" in found["merge of merged"]


def test_adapter_of_zeros_has_no_effect(inputs: Inputs, tmp_path: Path) -> None:
    def empty(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        save_file({name: 0 * weight for name, weight in load_file(path).items()}, path, metadata={"format": "pt"})

    found = failures(prove(changed(inputs, "train", tmp_path / "changed", empty), tmp_path / "out"))
    assert "the adapter was not loaded, or training changed nothing" in found["effect of adapter"]
    assert "answers of another model or run" in found["answers of adapter"]


def test_wrong_alpha_of_the_adapter_is_named(inputs: Inputs, tmp_path: Path) -> None:
    adapter = inputs["train"]
    facts = adapter.manifest.model
    assert facts is not None
    assert facts.adapter is not None
    told = facts.model_copy(update={"adapter": facts.adapter.model_copy(update={"alpha": facts.adapter.alpha * 2})})
    wrong = replace(adapter, manifest=adapter.manifest.model_copy(update={"model": told}))
    shutil.copytree(adapter.path, tmp_path / "changed")
    write_json_atomic(tmp_path / "changed" / "manifest.json", wrong.manifest.model_dump(mode="json"))
    found = failures(prove({**inputs, "train": replace(wrong, path=tmp_path / "changed")}, tmp_path / "out"))
    assert "alpha is 64.0 in its manifest, the spec says 32.0" in found["lineage of adapter"]


def test_stop_ids_that_the_folder_does_not_give_are_named(inputs: Inputs, tmp_path: Path) -> None:
    name = f"quantize-{FORMAT}"
    manifest = inputs[name].manifest
    assert manifest.model is not None
    told = manifest.model_copy(update={"model": manifest.model.model_copy(update={"stop_ids": (7,)})})
    shutil.copytree(inputs[name].path, tmp_path / "changed")
    write_json_atomic(tmp_path / "changed" / "manifest.json", told.model_dump(mode="json"))
    found = failures(prove({**inputs, name: Artifact(tmp_path / "changed", told)}, tmp_path / "out"))
    assert "stop_ids is (7,), the base has (2,)" in found[f"lineage of {FORMAT}"]
    assert "a server would not stop where the model does" in found[f"lineage of {FORMAT}"]


@pytest.mark.slow
def test_stale_quantized_model_of_another_run_is_named(
    inputs: Inputs, toy_base: Path, adapters_of: Callable[[Path], dict[str, ToyAdapter]], tmp_path: Path
) -> None:
    """The run before trained the other adapter; its quantized model was left in the place of this one's."""
    other = adapters_of(toy_base)["blue"]
    write_json_atomic(tmp_path / "quantize.json", {"output_dir": str(tmp_path / "stale"), "merged_dir": str(other.merged)})
    program("serving.quantize.openvino", tmp_path / "quantize.json")
    stale = Artifact(tmp_path / "stale", read_manifest(tmp_path / "stale"))
    found = failures(prove({**inputs, f"quantize-{FORMAT}": stale}, tmp_path / "out"))
    assert "stale, or of another run" in found[f"lineage of {FORMAT}"]
    assert f"log-probabilities of {FORMAT}" in found
    assert "answers of another model or run" in found[f"answers of {FORMAT}"]


def test_lost_context_is_named(inputs: Inputs, tmp_path: Path) -> None:
    def cut(folder: Path) -> None:
        write_json_atomic(folder / "config.json", {**read_json(folder / "config.json"), "max_position_embeddings": 128})

    found = failures(prove(changed(inputs, f"quantize-{FORMAT}", tmp_path / "changed", cut), tmp_path / "out"))
    assert "context length cut" in found[f"lineage of {FORMAT}"]


def test_leaked_training_row_is_named(inputs: Inputs, tmp_path: Path) -> None:
    def leak(folder: Path) -> None:
        row = (folder / "heldout.jsonl").read_text().splitlines()[1]
        with (folder / "train.jsonl").open("a") as stream:
            stream.write(row + "\n")

    found = failures(prove(changed(inputs, "rows", tmp_path / "changed", leak), tmp_path / "out"))
    assert found["held-out rows of dataset"] == "held-out row 1 is training row 36"


def test_answers_that_the_model_did_not_give_are_named(inputs: Inputs, tmp_path: Path) -> None:
    def swap(folder: Path) -> None:
        answers = read_answers(folder)
        write_answers(folder, [answers[0].model_copy(update={"ids": (9, 9)}), *answers[1:]])

    found = failures(prove(changed(inputs, "predict-merged", tmp_path / "changed", swap), tmp_path / "out"))
    assert "says 9 at token 0" in found["answers of merged"]
