"""The weight formats on a real, small model: the program of each, and what its files say of the weights."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import openvino
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from infra.answers import read_answers
from infra.contracts import WeightFacts, read_manifest, verify, write_manifest
from infra.errors import ArtifactError, ConfigError
from infra.settings import child_environment
from serving.config import PredictJob, ServeConfig
from serving.engines.registry import verify_model
from serving.formats import FormatConfig, QuantizeConfig, QuantizeJob, WeightFormat
from serving.predict import predict
from serving.quantize.calibration import training_rows
from serving.quantize.openvino import quantize
from serving.quantize.vllm import quantize as quantize_for_vllm
from serving.weights import read_openvino_weights

GROUP_SIZE = 32
CONFIG = QuantizeConfig(group_size=GROUP_SIZE, int4_share=1.0, calibration_rows=16)
Make = Callable[[WeightFormat], Path]


def run_module(module: str, folder: Path, **job: Any) -> subprocess.CompletedProcess[str]:
    config = folder.with_name(f"{folder.name}.json")
    config.write_text(json.dumps({"output_dir": str(folder), **job}))
    command = [sys.executable, "-m", module, "--config", str(config)]
    return subprocess.run(command, capture_output=True, text=True, env=child_environment("serving"), check=False)


@pytest.fixture(scope="session")
def make(toy_base: Path, toy_tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Makes the toy model in a format, once; all of OpenVINO's from one export."""
    place = tmp_path_factory.mktemp("formats")
    inputs = {"merged_dir": str(toy_base), "tokens_dir": str(toy_tokens)}

    def make_format(weight_format: WeightFormat) -> Path:
        folder = place / weight_format
        if folder.is_dir():
            return folder
        is_bnb = weight_format.startswith("bnb")
        job = {**inputs, "quantize": CONFIG.of(weight_format).model_dump()}
        if not is_bnb:
            job["exported_dir"] = str(exported())
        done = run_module("serving.quantize.bnb" if is_bnb else "serving.quantize.openvino", folder, **job)
        assert done.returncode == 0, done.stderr
        return folder

    def exported() -> Path:
        folder = place / "exported"
        if not folder.is_dir():
            done = run_module("serving.quantize.export", folder, merged_dir=str(toy_base))
            assert done.returncode == 0, done.stderr
        return folder

    return make_format


def matrices(folder: Path) -> dict[str, Any]:
    """Every matrix of an OpenVINO model as it computes with it, by the name that the layer has in transformers."""
    found = {}
    for node in openvino.Core().read_model(folder / "openvino_model.xml").get_ordered_ops():
        if node.get_type_name() != "MatMul" or not node.get_friendly_name().startswith("__module.model.layers"):
            continue
        source = node.input_value(1)
        if source.get_partial_shape().is_static and len(source.get_shape()) == 2:
            model = openvino.Model([source], [], "weight")
            name = node.get_friendly_name().removeprefix("__module.").partition("/")[0]
            found[f"{name}.weight"] = openvino.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})([])[0]
    return found


def whole_weights(folder: Path) -> dict[str, Any]:
    """Every tensor of a base model in 32 bits, which hold its 16 exactly."""
    import torch
    from safetensors.torch import load_file

    return {name: tensor.to(torch.float32).numpy() for name, tensor in load_file(folder / "model.safetensors").items()}


@pytest.mark.slow
def test_int4_is_each_group_rounded_to_sixteen_steps(make: Make, toy_base: Path) -> None:
    """Against plain arithmetic on the 16-bit weights: no number is further from its own than a step of its group."""
    whole = whole_weights(toy_base)
    made = matrices(make("openvino-int4"))
    assert len(made) == 14
    for name, rounded in made.items():
        groups = whole[name].reshape(-1, GROUP_SIZE)
        steps = (groups.max(axis=1) - groups.min(axis=1)) / 15
        error = numpy.abs(rounded.reshape(-1, GROUP_SIZE) - groups).max(axis=1)
        assert (error <= 1.1 * steps).all(), name  # a step: the zero point is rounded too; and a scale has 16 bits
        assert error.max() > 0


def test_sixteen_bits_are_the_very_weights(make: Make, toy_base: Path) -> None:
    whole = whole_weights(toy_base)
    made = matrices(make("bf16"))
    assert len(made) == 14
    assert all(numpy.array_equal(weight, whole[name]) for name, weight in made.items())


def test_data_aware_int4_names_its_rows_and_has_other_weights(make: Make, toy_tokens: Path) -> None:
    aware, free = (read_manifest(make(name)) for name in ("openvino-int4-awq", "openvino-int4"))
    assert aware.model is not None
    assert aware.model.weights is not None
    assert aware.model.weights.model_dump() == {
        "mode": "int4_asym", "group_size": GROUP_SIZE, "int4_share": 0.7896, "methods": ("awq", "scale_estimation"), "calibration_rows": 16,
    }  # fmt: skip
    assert aware.parents["tokens"] == read_manifest(toy_tokens).digest
    assert aware.files["openvino_model.bin"].sha256 != free.files["openvino_model.bin"].sha256


def test_calibration_rows_are_spread_over_the_training_split(toy_tokens: Path) -> None:
    from training.data.tokens import read_token_rows

    rows = [row.ids for row in read_token_rows(toy_tokens, "train")]
    assert [tuple(ids.tolist()) for ids in training_rows(toy_tokens, 3)] == [rows[0], rows[22], rows[44]]
    assert len(training_rows(toy_tokens, 500)) == len(rows) == 45


@pytest.mark.parametrize(
    ("change", "said"),
    [({"group_size": 64}, "in groups of 32.*manifest says int4_asym in groups of 64"), ({"mode": "int8_asym"}, "manifest says int8_asym")],
)
def test_weights_other_than_the_manifest_says_are_not_loaded(make: Make, tmp_path: Path, change: dict[str, Any], said: str) -> None:
    folder = make("openvino-int4")
    verify_model(folder, ServeConfig())
    edited = tmp_path / "edited"
    shutil.copytree(folder, edited)
    manifest = read_manifest(edited)
    assert manifest.model is not None
    assert manifest.model.weights is not None
    weights = manifest.model.weights.model_copy(update=change)
    write_manifest(edited, "quantized", manifest.provenance, manifest.model.model_copy(update={"weights": weights}))
    with pytest.raises(ArtifactError, match=said):
        verify_model(edited, ServeConfig())


def test_model_whose_own_record_was_edited_is_not_read(make: Make, tmp_path: Path) -> None:
    text = (make("openvino-int4") / "openvino_model.xml").read_text()
    assert '<group_size value="32" />' in text
    (tmp_path / "openvino_model.xml").write_text(text.replace('<group_size value="32" />', '<group_size value="64" />'))
    with pytest.raises(ArtifactError, match=r"in groups of 32.*NNCF recorded mode int4_asym with group size 64"):
        read_openvino_weights(tmp_path)


def test_group_size_that_divides_no_row_exits_2_and_names_the_layers(make: Make, toy_base: Path, tmp_path: Path) -> None:
    exported = make("openvino-int4").parent / "exported"
    quantize = FormatConfig(format="openvino-int4", group_size=48, int4_share=1.0).model_dump()
    done = run_module(
        "serving.quantize.openvino", tmp_path / "out", merged_dir=str(toy_base), exported_dir=str(exported), quantize=quantize
    )
    assert done.returncode == 2
    assert "quantize.group_size is 48" in done.stderr
    assert "q_proj" in done.stderr
    assert not (tmp_path / "out/manifest.json").exists()


def test_export_of_another_model_is_refused(make: Make, toy_base: Path, tmp_path: Path) -> None:
    exported = make("openvino-int4").parent / "exported"
    other = tmp_path / "other"
    shutil.copytree(toy_base, other)
    (other / "config.json").write_text((other / "config.json").read_text() + " ")
    base = verify(toy_base)
    write_manifest(other, "base", base.provenance, base.model)
    with pytest.raises(ArtifactError, match="exported from a model with digest"):
        quantize(QuantizeJob(output_dir=tmp_path / "out", merged_dir=other, exported_dir=exported))


def test_format_of_another_engine_is_refused_by_name(make: Make) -> None:
    with pytest.raises(
        ConfigError, match=r"weights are openvino-int4, which the engine 'torch' does not read\. Set serve\.engine to 'openvino'"
    ):
        verify_model(make("openvino-int4"), ServeConfig(engine="torch"))


@pytest.mark.slow
@pytest.mark.parametrize(("weight_format", "mode"), [("bnb-int8", "int8_sym"), ("bnb-nf4", "nf4")])
def test_bitsandbytes_format_is_answered_by_torch_and_timed(
    make: Make, toy_tokens: Path, tmp_path: Path, weight_format: WeightFormat, mode: str
) -> None:
    folder = make(weight_format)
    manifest = verify(folder, ("quantized",))
    assert manifest.model is not None
    assert manifest.model.weights is not None
    assert manifest.model.weights.mode == mode
    predict(
        PredictJob(
            output_dir=tmp_path / "answers", model_dir=folder, tokens_dir=toy_tokens, max_new_tokens=4, timed_streams=(1, 2),
            latency_rows=2, serve=ServeConfig(engine="torch"),
        )
    )  # fmt: skip
    speed = json.loads((tmp_path / "answers/speed.json").read_text())
    assert set(speed) == {"1", "2"}
    assert all(figures["tokens_per_s"] > 0 for figures in speed.values())
    timed = [answer.latency_s is not None for answer in read_answers(tmp_path / "answers")]
    assert [row for row, is_timed in enumerate(timed) if is_timed] == [0, len(timed) // 2]
    with pytest.raises(ConfigError, match=r"serve\.weights is 'nf4', and .* already"):
        verify_model(folder, ServeConfig(engine="torch", weights="nf4"))


@pytest.mark.slow
def test_bitsandbytes_format_keeps_the_configuration_of_a_model_that_an_older_transformers_wrote(toy_base: Path, tmp_path: Path) -> None:
    """A certificate refuses a config.json that says otherwise than the base's, and transformers would write its own names and defaults."""
    base = read_manifest(toy_base)
    old = shutil.copytree(toy_base, tmp_path / "old")
    config = json.loads((old / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config = {**{key: value for key, value in config.items() if key != "attention_dropout"}, "rope_theta": rope["rope_theta"]}
    (old / "config.json").write_text(json.dumps(config))
    write_manifest(old, "base", base.provenance, base.model)
    done = run_module("serving.quantize.bnb", tmp_path / "made", merged_dir=str(old), quantize=CONFIG.of("bnb-nf4").model_dump())
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "made/config.json").read_text())
    assert written.pop("quantization_config")["load_in_4bit"]
    assert written == config


def test_plain_weights_for_vllm_are_the_merged_ones_and_checked_as_such(toy_base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "vllm-bf16"
    done = run_module("serving.quantize.vllm", folder, merged_dir=str(toy_base), quantize=CONFIG.of("vllm-bf16").model_dump())
    assert done.returncode == 0, done.stderr
    manifest = verify_model(folder, ServeConfig(engine="vllm"))
    assert manifest.parents == {"merged": read_manifest(toy_base).digest}
    assert manifest.files == read_manifest(toy_base).files
    assert manifest.model is not None
    assert manifest.model.weights == WeightFacts(mode="bf16")
    with pytest.raises(ConfigError, match=r"vllm-bf16, which the engine 'torch' does not read\. Set serve\.engine to 'vllm'"):
        verify_model(folder, ServeConfig(engine="torch"))


def test_plain_weights_of_32_bits_are_refused_for_vllm(toy_base: Path, tmp_path: Path) -> None:
    """vLLM would round them to 16, to others than those that were trained."""
    base = read_manifest(toy_base)
    wide = shutil.copytree(toy_base, tmp_path / "wide")
    save_file({name: tensor.astype(numpy.float32) for name, tensor in matrices_of(toy_base)}, wide / "model.safetensors")
    write_manifest(wide, "base", base.provenance, base.model)
    with pytest.raises(ConfigError, match="weights are f32, bf16 or f16 is needed"):
        quantize_for_vllm(QuantizeJob(output_dir=tmp_path / "out", merged_dir=wide, quantize=CONFIG.of("vllm-bf16")))
    assert not (tmp_path / "out").exists()


def matrices_of(folder: Path) -> Iterator[tuple[str, numpy.ndarray[Any, Any]]]:
    """Arrays of zeros with the names and shapes of a model's weights."""
    with safe_open(folder / "model.safetensors", framework="np") as stream:
        for name in stream.keys():  # noqa: SIM118 - it is no mapping
            yield name, numpy.zeros(stream.get_slice(name).get_shape())
