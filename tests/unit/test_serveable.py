"""What could not be served is refused before it is trained, and the declared facts are those of the installed engines."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from infra.answers import Prompt, write_prompts
from infra.contracts import AdapterFacts, read_manifest
from infra.errors import ConfigError
from infra.settings import Settings
from pipelines import preflight, serveable
from pipelines.spec import Spec, load_spec
from pipelines.step import Artifact
from pipelines.steps import base, render
from serving.config import ServeConfig
from serving.formats import INT4_FORMATS, MODES_OF_FORMAT, WEIGHT_FORMATS
from serving.limits import ENGINE_OF_FORMAT, ENGINES, adapter_problems, cache_tokens, model_problems, with_engine_of
from training.config import KNOWN_MODEL_TYPES, LoraConfig

LLAMA = {
    "model_type": "llama", "max_position_embeddings": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "hidden_size": 64,
}  # fmt: skip


def spec_of(folder: Path, config: dict[str, Any], **settings: Any) -> Path:
    """A spec file on a base folder of which only the config is there."""
    (folder / "model").mkdir(parents=True)
    (folder / "model/config.json").write_text(json.dumps(config))
    (folder / "rows.jsonl").write_text("".join(json.dumps({"prompt": f"{i}", "completion": "yes"}) + "\n" for i in range(20)))
    spec = {"name": "toy", "base_model": "file:model", "dataset": {"type": "files", "train": "rows.jsonl"}, **settings}
    (folder / "toy.yaml").write_text(yaml.safe_dump(spec))
    return folder / "toy.yaml"


def adapter(**changes: Any) -> AdapterFacts:
    return AdapterFacts(**{"rank": 16, "alpha": 32, "target_modules": LoraConfig().target_modules, **changes})


@pytest.mark.parametrize("engine", ENGINES)
def test_engine_loads_every_model_that_can_be_trained_and_is_asked_for_no_other(engine: str) -> None:
    assert [model_problems(engine, model_type) for model_type in KNOWN_MODEL_TYPES] == [[]] * len(KNOWN_MODEL_TYPES)
    assert "'gpt2' is not among those" in model_problems(engine, "gpt2")[0]
    assert model_problems(engine, None)


def test_every_weight_format_has_an_engine() -> None:
    assert set(ENGINE_OF_FORMAT) == set(MODES_OF_FORMAT) == set(WEIGHT_FORMATS)
    assert set(ENGINE_OF_FORMAT.values()) <= set(ENGINES)
    assert set(INT4_FORMATS) <= set(WEIGHT_FORMATS)


def test_engine_follows_the_weight_format_unless_it_is_named() -> None:
    assert with_engine_of(ServeConfig(), "bnb-nf4").engine == "torch"
    assert with_engine_of(ServeConfig(port=1), "bf16").engine == "openvino"
    assert with_engine_of(ServeConfig(engine="vllm"), "bnb-nf4").engine == "vllm"
    assert with_engine_of(ServeConfig(), None) == ServeConfig()


@pytest.mark.parametrize("engine", ENGINES)
def test_adapter_is_held_against_every_limit_of_the_engine(engine: str) -> None:
    limits = ENGINES[engine].adapters
    assert adapter_problems(engine, adapter(rank=limits.max_rank)) == []
    assert f"rank {limits.max_rank + 1}" in adapter_problems(engine, adapter(rank=limits.max_rank + 1))[0]
    assert bool(adapter_problems(engine, adapter(use_dora=True))) != limits.takes_dora
    assert bool(adapter_problems(engine, adapter(use_rslora=True))) != limits.takes_rslora
    assert "['router']" in adapter_problems(engine, adapter(target_modules=("q_proj", "router")))[0]
    assert len(adapter_problems(engine, adapter(rank=limits.max_rank + 1, target_modules=("router",)))) == 2


def test_vllm_takes_no_dora_adapter_and_a_rank_of_512() -> None:
    assert "DoRA" in adapter_problems("vllm", adapter(use_dora=True))[0]
    assert adapter_problems("vllm", adapter(rank=512, use_rslora=True, target_modules=("lm_head",))) == []


def test_models_that_openvino_is_said_to_load_have_an_export() -> None:
    code = (
        "import optimum.exporters.openvino.model_configs, json; from optimum.exporters.tasks import TasksManager; "
        "known = TasksManager._SUPPORTED_MODEL_TYPE; "
        "print(json.dumps([name for name, by in known.items() if 'text-generation-with-past' in by.get('openvino', {})]))"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert ENGINES["openvino"].model_types <= set(json.loads(done.stdout.splitlines()[-1]))


def test_base_that_fits_passes(tmp_path: Path) -> None:
    spec = load_spec(spec_of(tmp_path, LLAMA, data={"max_tokens": 256}, evaluate={"max_new_tokens": 64}), [])
    serveable.check_source(spec)


@pytest.mark.parametrize(
    ("config", "settings", "problems"),
    [
        ({"model_type": "gpt2"}, {}, ["'gpt2' is not among those that the engine openvino", "the trainer cannot train model type 'gpt2'"]),
        ({}, {"data": {"max_tokens": 257}}, ["data.max_tokens is 257; the model's context holds 256. Lower data.max_tokens."]),
        ({}, {"evaluate": {"max_new_tokens": 256}}, ["evaluate.max_new_tokens is 256; the model's context holds 256"]),
        (  # 2 x 64 layers x 8 heads x 128 numbers are 128 KiB a token, so one GB holds 8192 tokens
            {"max_position_embeddings": 32768, "num_hidden_layers": 64, "num_key_value_heads": 8, "head_dim": 128},
            {"data": {"max_tokens": 8193}},
            ["data.max_tokens is 8193; serve.cache_gb 1 holds at most 8192. Raise serve.cache_gb"],
        ),
    ],
)
def test_base_that_could_not_be_served_is_refused_with_everything_that_is_wrong(
    tmp_path: Path, config: dict[str, Any], settings: dict[str, Any], problems: list[str]
) -> None:
    spec = load_spec(spec_of(tmp_path, {**LLAMA, **config}, **settings), [])
    with pytest.raises(ConfigError) as caught:
        preflight.check(spec, [], Settings(home=tmp_path / "home", tracking_uri="sqlite:///unused"), will_serve=False)
    assert caught.value.message.count("\n") == len(problems)
    assert all(problem in caught.value.message for problem in problems)


def test_run_that_would_serve_what_its_engine_cannot_read_is_refused(tmp_path: Path, free_port: int) -> None:
    spec = load_spec(spec_of(tmp_path, LLAMA, serve={"engine": "vllm", "port": free_port}), [])
    settings = Settings(home=tmp_path / "home", tracking_uri="sqlite:///unused")
    with pytest.raises(
        ConfigError,
        match=r"serve\.engine is 'vllm', which does not read openvino-int8.*Leave serve\.engine out.*'openvino'.*\(of vllm-bf16\)",
    ):
        preflight.check(spec, [], settings, will_serve=True)
    preflight.check(spec, [], settings, will_serve=False)
    with_folder = {"name": "gpu", "engine": "vllm", "model_dir": "merged"}
    for pools in ([{"name": "cpu"}, with_folder], [with_folder]):
        serve = {"pools": pools, "port": free_port}
        preflight.check(load_spec(spec_of(tmp_path / str(len(pools)), LLAMA, serve=serve), []), [], settings, will_serve=True)


def test_engine_that_reads_only_some_candidates_is_refused_and_one_that_is_not_named_follows(tmp_path: Path, free_port: int) -> None:
    formats = {"formats": ["openvino-int8", "bnb-nf4"]}
    settings = Settings(home=tmp_path / "home", tracking_uri="sqlite:///unused")
    for number, serve in enumerate(({"engine": "openvino"}, {"pools": [{"name": "one"}, {"name": "two", "engine": "openvino"}]})):
        spec = load_spec(spec_of(tmp_path / str(number), LLAMA, quantize=formats, serve={**serve, "port": free_port}), [])
        with pytest.raises(ConfigError, match=r"'openvino', which does not read bnb-nf4,.*only formats .*\(of openvino-int8, .*bf16\)"):
            preflight.check(spec, [], settings, will_serve=True)
    follows = load_spec(spec_of(tmp_path / "follows", LLAMA, quantize=formats, serve={"port": free_port}), [])
    preflight.check(follows, [], settings, will_serve=True)


def test_candidate_of_an_engine_whose_python_is_not_there_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path / "home", tracking_uri="sqlite:///unused")
    serve = {"engine": "vllm", "engine_python": str(tmp_path / "python")}
    spec = load_spec(spec_of(tmp_path, LLAMA, quantize={"formats": ["vllm-bf16"]}, serve=serve), [])
    with pytest.raises(ConfigError, match=r"the engine 'vllm' needs the package 'vllm': .*/python does not exist"):
        preflight.check(spec, [], settings, will_serve=False)
    elsewhere = settings.model_copy(update={"executor": "kubernetes"})  # whose images have an engine each
    with pytest.raises(ConfigError, match="SLIPWAY_STORE") as refused:
        preflight.check(spec, [], elsewhere, will_serve=False)
    assert "'vllm'" not in refused.value.message


def test_group_size_that_divides_no_row_is_refused_with_those_that_do(tmp_path: Path) -> None:
    config = {**LLAMA, "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "head_dim": 64}
    quantize = {"formats": ["openvino-int4"], "group_size": 128}
    spec = load_spec(spec_of(tmp_path, config, data={"max_tokens": 256}, quantize=quantize), [])
    with pytest.raises(ConfigError, match=r"quantize\.group_size is 128, .* rows of 576\. Set it to 96 or 64 or 48 or 32 or 16"):
        serveable.check_source(spec)
    int8_alone = {"formats": ["openvino-int8"], "group_size": 128}
    serveable.check_source(spec.model_copy(update={"quantize": spec.quantize.model_validate(int8_alone)}))


def test_run_that_would_put_adapters_on_what_it_has_merged_is_refused(tmp_path: Path, free_port: int) -> None:
    spec = load_spec(spec_of(tmp_path, LLAMA, serve={"adapters": {"red": "folder"}, "port": free_port}), [])
    settings = Settings(home=tmp_path / "home", tracking_uri="sqlite:///unused")
    with pytest.raises(ConfigError, match=r"serve\.adapters: a run serves what it has merged"):
        preflight.check(spec, [], settings, will_serve=True)
    preflight.check(spec, [], settings, will_serve=False)


@pytest.mark.parametrize("command", [("run", "--dry-run"), ("run",), ("train", "--dry-run"), ("train",), ("data", "check")])
def test_command_on_a_base_that_could_not_be_served_starts_nothing(tmp_path: Path, command: tuple[str, ...]) -> None:
    spec = spec_of(tmp_path, {**LLAMA, "model_type": "gpt2"})
    words = [*command[:2], str(spec)] if command[0] == "data" else [command[0], str(spec), *command[1:]]
    environment = {"SLIPWAY_HOME": str(tmp_path / "home"), "PATH": ""}
    done = subprocess.run([sys.executable, "-m", "pipelines.cli", *words], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "'gpt2'" in done.stderr
    assert not (tmp_path / "home").exists()


def test_base_from_elsewhere_is_checked_as_soon_as_it_is_made(toy_base: Path, tmp_path: Path) -> None:
    spec = load_spec(spec_of(tmp_path, LLAMA, data={"max_tokens": 4096}), [])
    step = base.step(spec.model_copy(update={"base_model": "hf:owner/name"}))  # so that its config is unknown until it was fetched
    assert step.check is not None
    with pytest.raises(ConfigError, match=r"base model 'hf:owner/name': .*\n.*max_tokens is 4096; the model's context holds 256"):
        step.check(Artifact(toy_base, read_manifest(toy_base)), {})


def test_small_model_that_could_not_guess_for_the_base_is_refused(toy_base: Path, toy_quantized: Path, tmp_path: Path) -> None:
    draft = tmp_path / "draft"
    shutil.copytree(toy_quantized, draft)
    serve = {"speculative": {"kind": "draft", "draft_model_dir": str(draft)}}
    spec = load_spec(spec_of(tmp_path / "spec", LLAMA, data={"max_tokens": 256}, evaluate={"max_new_tokens": 64}, serve=serve), [])
    serveable.check_base(spec, toy_base)
    manifest = json.loads((draft / "manifest.json").read_text())
    manifest["model"]["tokenizer_digest"] = "0" * 64
    (draft / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ConfigError, match=r"draft_model_dir: its tokenizer is another"):
        serveable.check_base(spec, toy_base)
    shutil.rmtree(draft)
    with pytest.raises(ConfigError, match=r"draft_model_dir: .*no manifest\.json"):
        serveable.check_source(spec)


def test_prompts_that_leave_no_room_for_an_answer_are_refused_after_render(toy_base: Path, toy_tokens: Path, tmp_path: Path) -> None:
    write_prompts(tmp_path, [Prompt(row=0, ids=(5,) * 200, expected="a"), Prompt(row=1, ids=(5,) * 10, expected="b")])
    inputs = {"base": Artifact(toy_base, read_manifest(toy_base))}
    made = Artifact(tmp_path, read_manifest(toy_tokens))

    def check(max_new_tokens: int) -> None:
        dataset = {"type": "files", "train": "rows.jsonl"}
        evaluate = {"max_new_tokens": max_new_tokens}
        step = render.step(Spec.model_validate({"name": "toy", "base_model": "hf:a/b", "dataset": dataset, "evaluate": evaluate}))
        assert step.check is not None
        step.check(made, inputs)

    check(56)
    with pytest.raises(ConfigError, match=r"prompt has 200 tokens and evaluate.max_new_tokens is 57, which is 257 together; .* holds 256"):
        check(57)


def test_cache_of_an_unknown_size_bounds_nothing() -> None:
    assert cache_tokens("vllm", 1000, 1) is None
    assert cache_tokens("openvino", 1024, 2) == 2 << 20
