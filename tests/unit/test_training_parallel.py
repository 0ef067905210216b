"""However a model is laid over two or four gloo processes, ten steps give the losses and the weights of one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from infra.errors import ConfigError
from tests.unit.workers import CHECKPOINT_STEP, train_in_processes
from training.base import CONFIG_NAME
from training.config import FinetuneJob, LoraConfig, TrainConfig
from training.preflight import check_layout

STEPS = 10
# fp32 sums in another order: losses of about 5 move by 5e-7, and ten steps of 0.01 by AdamW carry that into values of about 0.3
LOSS_TOLERANCE, VALUE_TOLERANCE = 1e-5, 5e-5
LORA = {"lora": LoraConfig(rank=4, alpha=8), "learning_rate": 1e-2}
FULL = {"method": "full", "learning_rate": 1e-3}
LAYOUTS: dict[str, dict[str, Any]] = {
    "lora-1": LORA,
    "data": {**LORA, "num_workers": 2},
    "shard": {**LORA, "num_workers": 2, "parallel": {"shard": 2}},
    "tensor": {**LORA, "num_workers": 2, "parallel": {"tensor": 2}},
    "pipeline": {**LORA, "num_workers": 2, "parallel": {"pipeline": 2}},
    "shard-checkpointing": {**LORA, "num_workers": 2, "gradient_checkpointing": True, "parallel": {"shard": 2}},
    "full-shard": {**FULL, "num_workers": 2, "parallel": {"shard": 2}},
    "full-tensor": {**FULL, "num_workers": 2, "parallel": {"tensor": 2}},
    "full-pipeline": {**FULL, "num_workers": 2, "parallel": {"pipeline": 2}},
    "data-4": {**LORA, "num_workers": 4},
    "shard-4": {**LORA, "num_workers": 4, "parallel": {"shard": 4}, "micro_batch_rows": 1},  # some have a pass more than others
    "tensor-4": {**LORA, "num_workers": 4, "parallel": {"tensor": 4}},
    "pipeline-4": {**LORA, "num_workers": 4, "parallel": {"pipeline": 4}},
    "data-shard": {**LORA, "num_workers": 4, "parallel": {"shard": 2}},
    "shard-tensor": {**LORA, "num_workers": 4, "parallel": {"shard": 2, "tensor": 2}},
    "pipeline-shard": {**LORA, "num_workers": 4, "parallel": {"pipeline": 2, "shard": 2}},
    "full-pipeline-tensor": {**FULL, "num_workers": 4, "parallel": {"pipeline": 2, "tensor": 2}},
}

# Who goes on from whose checkpoint: every layout once, by another number of workers or in another layout.
RESUMED_BY = {
    "lora-1": "shard", "data": "lora-1", "shard": "pipeline-shard", "tensor": "data", "pipeline": "tensor", "shard-tensor": "data-4",
}  # fmt: skip


def config(**settings: Any) -> TrainConfig:
    return TrainConfig.model_validate({"precision": "fp32", "batch_rows": 10, "micro_batch_rows": 3, "epochs": 10, **settings})


@pytest.fixture(scope="module")
def wide_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama that four workers can share in every way: four layers, four heads of each kind, a head of its own."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("wide")
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4,
            max_position_embeddings=256, tie_word_embeddings=False, initializer_range=0.1,
        )
    ).save_pretrained(folder)  # fmt: skip
    return folder


def train_all(
    chosen: dict[str, TrainConfig], wide_base: Path, toy_tokens: Path, place: Path, resume: bool = False
) -> dict[str, dict[str, Any]]:
    """Every config's outcome, those for the same number of workers in the same processes."""
    results = {}
    for num_workers in (1, 2, 4):
        names = [name for name, each in chosen.items() if each.num_workers == num_workers]
        made = train_in_processes([chosen[name] for name in names], wide_base, toy_tokens, STEPS, place / str(num_workers), resume)
        results |= dict(zip(names, made, strict=True))
    return results


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where each layout that others go on from leaves its checkpoint."""
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def outcomes(wide_base: Path, toy_tokens: Path, checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Of every layout, and of one process for each method."""
    chosen = {**LAYOUTS, "full-1": FULL}
    urls = {name: {"checkpoint_url": str(checkpoints / name)} for name in RESUMED_BY}
    configs = {name: config(**settings, **urls.get(name, {})) for name, settings in chosen.items()}
    return train_all(configs, wide_base, toy_tokens, tmp_path_factory.mktemp("parallel"))


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "lora-1"])
def test_layout_gives_the_losses_and_values_of_one_process(outcomes: dict[str, dict[str, Any]], name: str) -> None:
    found, expected = outcomes[name], outcomes["full-1" if name.startswith("full") else "lora-1"]
    assert found["loss"] == pytest.approx(expected["loss"], abs=LOSS_TOLERANCE)
    assert found["heldout_loss"] == pytest.approx(expected["heldout_loss"], abs=LOSS_TOLERANCE)
    assert found["gradient_norm"] == pytest.approx(expected["gradient_norm"], rel=1e-4)
    assert set(found["values"]) == set(expected["values"])
    for key, value in expected["values"].items():
        assert torch.allclose(found["values"][key], value, rtol=0, atol=VALUE_TOLERANCE), key
    assert expected["loss"][-1] < 0.8 * expected["loss"][0]


@pytest.mark.slow
def test_checkpoint_of_each_layout_is_resumed_by_the_others(
    outcomes: dict[str, dict[str, Any]], wide_base: Path, toy_tokens: Path, checkpoints: Path, tmp_path: Path
) -> None:
    configs = {name: config(**LAYOUTS[other], checkpoint_url=str(checkpoints / name)) for name, other in RESUMED_BY.items()}
    for name, outcome in train_all(configs, wide_base, toy_tokens, tmp_path, resume=True).items():
        assert outcome["loss"] == pytest.approx(outcomes["lora-1"]["loss"][CHECKPOINT_STEP:], abs=LOSS_TOLERANCE), name
        for key, value in outcomes["lora-1"]["values"].items():
            assert torch.allclose(outcome["values"][key], value, rtol=0, atol=VALUE_TOLERANCE), (name, key)


@pytest.mark.parametrize(
    ("change", "settings", "said"),
    [
        ({}, {"num_workers": 8, "parallel": {"tensor": 8}}, "num_attention_heads 4"),
        ({"num_key_value_heads": 1}, {"num_workers": 2, "parallel": {"tensor": 2}}, "num_key_value_heads 1"),
        ({"intermediate_size": 129}, {"num_workers": 2, "parallel": {"tensor": 2}}, "intermediate_size 129"),
        ({"mlp_bias": True}, {"num_workers": 2, "parallel": {"tensor": 2}}, "mlp_bias"),
        ({}, {"num_workers": 5, "parallel": {"pipeline": 5}}, "4 layers"),
        ({"tie_word_embeddings": True}, {"num_workers": 2, "method": "full", "parallel": {"pipeline": 2}}, "tie_word_embeddings"),
        ({}, {"num_workers": 4, "batch_rows": 3}, "batch_rows 3"),
    ],
)
def test_layout_that_the_model_does_not_allow_is_refused_before_anything_starts(
    wide_base: Path, tmp_path: Path, change: dict[str, Any], settings: dict[str, Any], said: str
) -> None:
    model = json.loads((wide_base / CONFIG_NAME).read_text())
    (tmp_path / CONFIG_NAME).write_text(json.dumps({**model, **change}))
    job = FinetuneJob(output_dir=tmp_path, base_dir=tmp_path, tokens_dir=tmp_path, train=config(**settings))
    with pytest.raises(ConfigError, match=said):
        check_layout(job)


def test_layouts_that_the_model_allows_are_not_refused(wide_base: Path, tmp_path: Path) -> None:
    for settings in LAYOUTS.values():
        check_layout(FinetuneJob(output_dir=tmp_path, base_dir=wide_base, tokens_dir=tmp_path, train=config(**settings)))
