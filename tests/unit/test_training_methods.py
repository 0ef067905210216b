"""Each way to train computes what its definition says: DoRA, quantized bases, full fine-tuning, the optimizers, fp16, checkpointing."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from infra.contracts import read_manifest, write_manifest
from infra.errors import ArtifactError, ConfigError
from infra.provenance import Provenance
from training import generate
from training.config import FinetuneJob, LoraConfig, MergeJob, TrainConfig
from training.data.tokens import TokenRow, read_token_rows
from training.finetune import trained_facts
from training.loop import Trainer
from training.merge import merge
from training.model import PackModel, load_base, prepare_model
from training.packing import make_pack
from training.precision import FIRST_SCALE, LossScale
from training.preflight import count_trained
from training.quantized import dense
from training.result import write_result

LORA = LoraConfig(rank=4, alpha=8)
OPTIMIZERS = ["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "lion", "adafactor", "sgd"]


def trainer(base_dir: Path, tokens_dir: Path, **settings: Any) -> Trainer:
    given = {"lora": LORA, "batch_rows": 10, "epochs": 1, "learning_rate": 1e-2, "precision": "fp32", **settings}
    config = TrainConfig.model_validate(given)
    dtype = torch.float32 if config.precision == "fp32" else torch.float16
    return Trainer(prepare_model(base_dir, config, dtype), config, read_token_rows(tokens_dir, "train"))


def plain_loss(model: Any, rows: list[TokenRow]) -> torch.Tensor:
    """Sum of the losses as transformers and torch give them, one row after another."""
    total = torch.zeros(())
    for row in rows:
        ids, marks = torch.tensor([row.ids]), torch.tensor(row.supervised)[1:]
        logits = model(input_ids=ids).logits[0, :-1].float()
        total = total + torch.nn.functional.cross_entropy(logits[marks], ids[0, 1:][marks], reduction="sum")
    return total


def test_full_fine_tuning_gradients_equal_plain_autograd(toy_base: Path, toy_tokens: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.loss.CHUNK_BYTES", 7 * 320 * 4)
    rows = read_token_rows(toy_tokens, "train")[:6]
    own, plain = (load_base(toy_base, torch.float32, kind).requires_grad_(True) for kind in (generate.NAME, "eager"))
    PackModel(own)(make_pack(rows)).sum().backward()
    plain_loss(plain, rows).backward()
    expected = {name: parameter.grad for name, parameter in plain.named_parameters()}
    found = {name: parameter.grad for name, parameter in own.named_parameters()}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, atol=1e-5 * float(gradient.abs().max()) + 1e-6), name


def test_full_fine_tuning_writes_a_model_that_transformers_loads(toy_base: Path, toy_tokens: Path, tmp_path: Path) -> None:
    run = trainer(toy_base, toy_tokens, method="full", learning_rate=1e-3)
    losses = [run.train_step().loss for _ in range(5)]
    assert losses[-1] < 0.8 * losses[0]
    job = FinetuneJob(output_dir=tmp_path, base_dir=toy_base, tokens_dir=toy_tokens, train=run.config)
    write_result(run, job)
    before, after = load_file(toy_base / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert {name: (value.shape, value.dtype) for name, value in before.items()} == {
        name: (value.shape, value.dtype) for name, value in after.items()
    }
    values = run.trained.whole_tensors()
    assert len(values) == len(after)
    assert all(torch.equal(after[name], values[f"causal_model.{name}"].to(torch.bfloat16)) for name in after)
    assert not torch.equal(before["model.norm.weight"], after["model.norm.weight"])
    assert count_trained(job) == run.trained.master.numel()
    facts = trained_facts(job, read_manifest(toy_base))
    assert facts.adapter is None
    assert facts.base_digest == read_manifest(toy_base).digest


def test_dora_gradients_equal_autograd_with_the_norm_held_constant(toy_base: Path, toy_tokens: Path) -> None:
    from training.lora import LoraLinear

    config = TrainConfig(lora=LORA.model_copy(update={"use_dora": True}))
    model = prepare_model(toy_base, config, torch.float32)
    layer = next(module for module in model.modules() if isinstance(module, LoraLinear))
    layer.lora_B.data.normal_(0, 0.3)
    layer.lora_magnitude_vector.data.mul_(1.3)
    x, weights = torch.randn(5, 64), torch.randn(5, 64)
    (layer(x) * weights).sum().backward()
    a, b, m = (parameter.detach().clone().requires_grad_() for parameter in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector))
    whole = layer.weight + layer.scale * b @ a
    directed = whole * (m / whole.detach().norm(dim=1))[:, None]
    ((x @ directed.t()) * weights).sum().backward()
    for own, expected in zip((layer.lora_A, layer.lora_B, layer.lora_magnitude_vector), (a, b, m), strict=True):
        assert torch.allclose(own.grad, expected.grad, rtol=1e-4, atol=1e-4)


def test_dora_merged_model_equals_the_model_with_its_adapter(toy_base: Path, toy_tokens: Path, tmp_path: Path) -> None:
    run = trainer(toy_base, toy_tokens, lora=LORA.model_copy(update={"use_dora": True}))
    for _ in range(3):
        run.train_step()
    adapter_dir = tmp_path / "adapter"
    adapter_dir.mkdir()
    job = FinetuneJob(output_dir=adapter_dir, base_dir=toy_base, tokens_dir=toy_tokens, train=run.config)
    write_result(run, job)
    assert count_trained(job) == run.trained.master.numel()
    write_manifest(adapter_dir, "adapter", Provenance(), model=trained_facts(job, read_manifest(toy_base)))
    merge(MergeJob(output_dir=tmp_path / "merged", base_dir=toy_base, adapter_dir=adapter_dir))
    pack = make_pack(run.rows[:4])
    with torch.no_grad():
        merged, adapted, base = (
            float(model(pack).mean())
            for model in (
                PackModel(load_base(tmp_path / "merged", torch.float32)),
                run.model,
                PackModel(load_base(toy_base, torch.float32)),
            )
        )
    assert merged == pytest.approx(adapted, abs=0.02)  # merged weights are rounded to bf16
    assert abs(base - adapted) > 0.2


@pytest.mark.parametrize(("quantization", "lost_share"), [("nf4", 0.15), ("int8", 0.02)])
def test_quantized_base_gives_loss_and_gradients_of_its_dense_weights(
    toy_base: Path, toy_tokens: Path, quantization: Any, lost_share: float
) -> None:
    config = TrainConfig(lora=LORA.model_copy(update={"target_modules": ("q_proj", "down_proj")}), base_quantization=quantization)
    quantized, plain = (prepare_model(toy_base, each, torch.float32) for each in (config, TrainConfig(lora=config.lora)))
    for name, module in plain.named_modules():
        stored = quantized.get_submodule(name)
        if name.endswith("_proj"):
            error = (dense(stored.weight, torch.float32) - module.weight).norm() / module.weight.norm()
            assert 0 < float(error) < lost_share, name
            module.weight.data.copy_(dense(stored.weight, torch.float32))
        if hasattr(module, "lora_B"):
            for side in ("lora_A", "lora_B"):
                values = torch.randn_like(getattr(module, side)) * 0.1
                getattr(module, side).data.copy_(values)
                getattr(stored, side).data.copy_(values)
    pack = make_pack(read_token_rows(toy_tokens, "train")[:5])
    losses = [PackModel(model)(pack).sum() for model in (quantized, plain)]
    for loss in losses:
        loss.backward()
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-6)
    expected = {name: parameter.grad for name, parameter in plain.named_parameters() if parameter.requires_grad}
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        found = quantized.get_parameter(name).grad
        assert float((found - gradient).abs().max()) < 1e-5 * scale, name


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_optimizer_lowers_the_loss_and_resumes_bit_for_bit(toy_base: Path, toy_tokens: Path, optimizer: str) -> None:
    settings = {"optimizer": optimizer, "epochs": 4, "learning_rate": 0.3 if optimizer in ("sgd", "adafactor") else 1e-2}
    whole, resumed = trainer(toy_base, toy_tokens, **settings), trainer(toy_base, toy_tokens, **settings)
    losses = [whole.train_step().loss for _ in range(6)]
    state = copy.deepcopy(whole.state({}))
    losses += [whole.train_step().loss for _ in range(6)]
    assert losses[-1] < 0.8 * losses[0]
    resumed.restore(state)
    assert [resumed.train_step().loss for _ in range(6)] == losses[6:]
    assert torch.equal(resumed.trained.master, whole.trained.master)


def test_optimizer_state_of_other_pieces_is_refused(toy_base: Path, toy_tokens: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a version wrote it that stepped larger pieces: half of them would go on from nothing."""
    whole = trainer(toy_base, toy_tokens, optimizer="adamw_8bit")
    whole.train_step()
    monkeypatch.setattr("training.optimizer.CHUNK_ELEMENTS", 4096)
    with pytest.raises(ArtifactError, match=r"in 1 piece\(s\), and it is stepped in \d+ here"):
        trainer(toy_base, toy_tokens, optimizer="adamw_8bit").restore(whole.state({}))


def test_gradient_checkpointing_gives_the_same_gradients_with_dropout(toy_base: Path, toy_tokens: Path) -> None:
    lora = LORA.model_copy(update={"dropout": 0.2})
    runs = [trainer(toy_base, toy_tokens, lora=lora, gradient_checkpointing=given) for given in (False, True)]
    for _ in range(2):
        reports = [run.train_step() for run in runs]
        assert reports[0].loss == reports[1].loss
    assert torch.equal(runs[0].trained.gradient, runs[1].trained.gradient)


def test_fp16_training_scales_the_loss_and_learns(toy_base: Path, toy_tokens: Path) -> None:
    half, wide = trainer(toy_base, toy_tokens, precision="fp16"), trainer(toy_base, toy_tokens)
    reports = [(half.train_step(), wide.train_step()) for _ in range(5)]
    assert half.trained.master.dtype == torch.float32
    for one, other in reports:
        assert one.loss == pytest.approx(other.loss, rel=0.03)
        assert one.gradient_norm == pytest.approx(other.gradient_norm, rel=0.1)


def test_fp16_step_with_an_overflow_is_left_out_and_halves_the_scale(toy_base: Path, toy_tokens: Path) -> None:
    run = trainer(toy_base, toy_tokens, precision="fp16")
    run._scale.value = 2.0**40
    before = run.trained.master.detach().clone()
    assert not torch.isfinite(torch.tensor(run.train_step().gradient_norm))
    assert torch.equal(run.trained.master, before)
    assert run._scale.value == 2.0**39
    run._scale.value = 1.0
    assert run._scale.accepts(float("inf"))  # so that the step is refused with its rows
    restored = LossScale(is_active=True)
    assert restored.value == FIRST_SCALE
    restored.restore(run.state({}).facts["loss_scale"])
    assert restored == run._scale


def test_gradient_that_is_not_finite_names_the_rows(toy_base: Path, toy_tokens: Path) -> None:
    run = trainer(toy_base, toy_tokens)
    next(each for each in run.model.parameters() if each.requires_grad).register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(ConfigError, match=r"step 1: the gradient norm is nan in a batch with the rows \[\d+,"):
        run.train_step()


def test_settings_that_exclude_each_other_are_all_named() -> None:
    with pytest.raises(ValueError, match=r"freezes the base.*no multiple of 2"):
        TrainConfig.model_validate({"method": "full", "base_quantization": "nf4", "num_workers": 3, "parallel": {"tensor": 2}})
