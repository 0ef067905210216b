"""What OpenVINO's plugin is told of a model folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from infra.contracts import ModelFacts, Provenance, WeightFacts, write_manifest
from serving.engines.openvino_device import activation_group_size, device_properties

GROUP_SIZE = "DYNAMIC_QUANTIZATION_GROUP_SIZE"
SMOLLM = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "head_dim": 64}


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((576, 1536), 96),
        ((4096, 14336), 128),
        ((576, 1536, 64), 64),
        ((64, 128), 64),
        ((576, 1536, 32), None),
        ((48, 96), None),
        ((), None),
    ],
)
def test_activation_group_is_the_largest_that_falls_into_every_row_and_group_of_weights(
    sizes: tuple[int, ...], expected: int | None
) -> None:
    assert activation_group_size(sizes) == expected


def test_properties_of_a_folder_follow_its_config_and_the_groups_of_its_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SMOLLM))
    assert device_properties(tmp_path, 2, "f32")[GROUP_SIZE] == "96"
    facts = ModelFacts(
        base_model="file:toy", base_digest="0", tokenizer_digest="0", chat_template_digest="0", special_tokens={}, context_tokens=64,
        stop_ids=(0,), quantization="openvino-int8",
    )  # fmt: skip
    for weights, expected in ((WeightFacts(mode="int8_asym"), "96"), (WeightFacts(mode="int4_asym", group_size=64), "64")):
        write_manifest(tmp_path, "quantized", Provenance(), facts.model_copy(update={"weights": weights}))
        assert device_properties(tmp_path, 2, "f32")[GROUP_SIZE] == expected
