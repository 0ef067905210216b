"""Packs, packed attention, hand-written gradients and the loss give what plain transformers and autograd give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from infra.contracts import AdapterFacts
from infra.errors import ArtifactError, ConfigError
from training import generate
from training.adapter import ADAPTER_NAME, adapter_facts
from training.config import FinetuneJob, LoraConfig, TrainConfig
from training.data.tokens import TokenRow, read_token_rows
from training.loop import Trainer
from training.lora import LoraLinear, initialize, load_tensors, peft_name
from training.loss import SupervisedLoss
from training.model import PackModel, attach_adapter, load_base
from training.packing import make_pack
from training.parameters import TrainableParameters
from training.preflight import count_trained
from training.recorder import Recorder
from training.result import write_result
from training.worker import open_store, train_to_end

FACTS = AdapterFacts(rank=4, alpha=8, target_modules=("q_proj", "v_proj", "o_proj", "up_proj", "down_proj"))
LORA = LoraConfig(rank=4, alpha=8, target_modules=FACTS.target_modules)
LOSS_TOLERANCE = 1e-5  # losses of about 6.9, where neighbouring fp32 numbers are 5e-7 apart and products add up in another order


def adapted(base_dir: Path, implementation: str = generate.NAME, lora: LoraConfig = LORA) -> Any:
    """The toy base in fp32 with adapters that are not zero."""
    model = load_base(base_dir, torch.float32, implementation)
    attach_adapter(model, adapter_facts(lora), lora.dropout)
    initialize(model, 1)
    generator = torch.Generator().manual_seed(2)
    for module in model.modules():
        if isinstance(module, LoraLinear):
            module.lora_B.data.normal_(0, 0.1, generator=generator)
    return model


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def plain_loss(model: Any, rows: list[TokenRow]) -> torch.Tensor:
    """The mean loss that transformers and torch give, one row after another."""
    total, count = torch.zeros(()), 0
    for row in rows:
        ids = torch.tensor([row.ids])
        labels = torch.tensor([token if marked else -100 for token, marked in zip(row.ids, row.supervised, strict=True)])
        logits = model(input_ids=ids).logits[0, :-1].float()
        total = total + torch.nn.functional.cross_entropy(logits, labels[1:], reduction="sum")
        count += sum(row.supervised[1:])
    return total / count


def _assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    assert set(found) == set(expected)
    scale = max(float(tensor.abs().max()) for tensor in expected.values())
    for name in expected:
        assert float((found[name] - expected[name]).abs().max()) <= tolerance * scale, name


@pytest.mark.parametrize("count", [1, 2, 9])
def test_pack_loss_and_gradients_equal_plain_transformers(toy_base: Path, toy_tokens: Path, count: int) -> None:
    rows = read_token_rows(toy_tokens, "train")[:count]
    packed, plain = adapted(toy_base), adapted(toy_base, "eager")
    pack = make_pack(rows)
    assert (pack.prefix_tokens > 0) == (count > 1)
    loss = PackModel(packed)(pack).sum() / pack.num_supervised
    expected = plain_loss(plain, rows)
    loss.backward()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=LOSS_TOLERANCE)
    _assert_same(gradients(packed), gradients(plain), 1e-5)


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "mistral"])
def test_pack_loss_equals_plain_transformers_for_each_known_model(model_type: str, toy_tokens: Path, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    extra: dict[str, Any] = {"head_dim": 8} if model_type == "qwen3" else {}
    extra |= {"sliding_window": None} if model_type == "mistral" else {}
    config = AutoConfig.for_model(model_type, vocab_size=320, max_position_embeddings=256, initializer_range=0.2, **sizes, **extra)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    rows = read_token_rows(toy_tokens, "train")[:5]
    packed, plain = load_base(tmp_path, torch.float32), load_base(tmp_path, torch.float32, "eager")
    pack = make_pack(rows)
    loss = float(PackModel(packed)(pack).sum() / pack.num_supervised)
    assert loss == pytest.approx(float(plain_loss(plain, rows)), abs=LOSS_TOLERANCE)


def test_pack_rows_do_not_see_each_other(toy_base: Path, toy_tokens: Path) -> None:
    rows = read_token_rows(toy_tokens, "train")[:4]
    changed = [*rows[:3], TokenRow(3, (*rows[3].ids[:-8], *([77] * 8)), rows[3].supervised)]
    model = load_base(toy_base, torch.float32)
    one, other = (PackModel(model)(make_pack(these)) for these in (rows, changed))
    kept = make_pack(rows).target_rows < 3
    assert torch.equal(one[kept], other[kept])
    assert not torch.equal(one, other)


def test_loss_equals_cross_entropy_over_several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.loss.CHUNK_BYTES", 3 * 11 * 4)
    hidden, head, targets = torch.randn(8, 6, requires_grad=True), torch.randn(11, 6, requires_grad=True), torch.arange(8)
    weights = torch.rand(8)
    (SupervisedLoss.apply(hidden, head, targets) * weights).sum().backward()
    found = [hidden.grad, head.grad]
    hidden.grad = head.grad = None
    (torch.nn.functional.cross_entropy(hidden @ head.t(), targets, reduction="none") * weights).sum().backward()
    for own, expected in zip(found, (hidden.grad, head.grad), strict=True):
        assert own is not None
        assert torch.allclose(own, expected, atol=1e-6)


def test_lora_gradients_equal_autograd_and_frozen_weights_get_none(toy_base: Path) -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(6, 5).requires_grad_(False)
    layer = LoraLinear(linear, AdapterFacts(rank=3, alpha=2.1, target_modules=()), 0.0, torch.float32)
    layer.lora_A.data.normal_()
    layer.lora_B.data.normal_()
    x, weight = torch.randn(4, 6, requires_grad=True), torch.randn(4, 5)
    (layer(x) * weight).sum().backward()
    found = [x.grad, layer.lora_A.grad, layer.lora_B.grad]
    a, b = layer.lora_A.detach().requires_grad_(), layer.lora_B.detach().requires_grad_()
    y = x.detach().requires_grad_()
    ((torch.nn.functional.linear(y, linear.weight, linear.bias) + 0.7 * (y @ a.t()) @ b.t()) * weight).sum().backward()
    for one, other in zip(found, [y.grad, a.grad, b.grad], strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    assert linear.weight.grad is None


def trainer(base_dir: Path, tokens_dir: Path, **settings: Any) -> Trainer:
    config = TrainConfig(precision="fp32", **{"lora": LORA, "batch_rows": 10, "epochs": 1, "learning_rate": 1e-2, **settings})
    return Trainer(adapted(base_dir, lora=config.lora), config, read_token_rows(tokens_dir, "train"))


def trained_values(run: Trainer) -> list[torch.Tensor]:
    """What the model computes with."""
    return [parameter.detach() for parameter in run.model.parameters() if parameter.requires_grad]


@pytest.mark.parametrize("micro_batch_rows", [1, 3, 4])
def test_accumulation_over_micro_batches_equals_the_whole_batch(toy_base: Path, toy_tokens: Path, micro_batch_rows: int) -> None:
    whole, parts = trainer(toy_base, toy_tokens, micro_batch_rows=10), trainer(toy_base, toy_tokens, micro_batch_rows=micro_batch_rows)
    one, other = whole.train_step(), parts.train_step()
    assert one.loss == pytest.approx(other.loss, abs=1e-6)
    assert one.gradient_norm == pytest.approx(other.gradient_norm, rel=1e-5)
    assert torch.allclose(whole.trained.gradient, parts.trained.gradient, atol=1e-6)


@pytest.mark.parametrize("micro_batch_rows", [2, 4])
def test_last_short_batch_of_an_epoch_weighs_its_own_tokens(toy_base: Path, toy_tokens: Path, micro_batch_rows: int) -> None:
    """45 rows in batches of ten: the fifth has five, and with these micro-batches its last pack is short too."""
    run = trainer(toy_base, toy_tokens, micro_batch_rows=micro_batch_rows)
    run.step = 4
    rows = [run.rows[index] for index in run.plan.rows_of_step(4)]
    model = adapted(toy_base, "eager")
    plain = plain_loss(model, rows)
    plain.backward()
    report = run.train_step()
    assert len(rows) == report.rows == 5
    assert report.loss == pytest.approx(float(plain.detach()), abs=LOSS_TOLERANCE)
    norm = torch.cat([value.flatten() for value in gradients(model).values()]).norm()
    assert report.gradient_norm == pytest.approx(float(norm), rel=1e-4)


def test_training_toy_rows_loss_falls(toy_base: Path, toy_tokens: Path) -> None:
    run = trainer(toy_base, toy_tokens, epochs=4, learning_rate=3e-2)
    rows = read_token_rows(toy_tokens, "heldout")
    before = run.evaluate(rows)
    losses = [run.train_step().loss for _ in range(run.total_steps)]
    assert losses[-1] < 0.5 * losses[0]
    assert run.evaluate(rows) < 0.6 * before


def test_gradient_is_clipped_before_the_update(toy_base: Path, toy_tokens: Path) -> None:
    run = trainer(toy_base, toy_tokens, max_gradient_norm=1e-3)
    assert run.train_step().gradient_norm > 1e-2
    assert float(run.trained.gradient.norm()) == pytest.approx(1e-3, rel=1e-4)


def test_bf16_step_keeps_master_weights_that_rounding_would_lose(toy_base: Path, toy_tokens: Path) -> None:
    model = load_base(toy_base, torch.bfloat16)
    attach_adapter(model, FACTS)
    initialize(model, 0)
    config = TrainConfig(precision="bf16", lora=LORA, batch_rows=10, learning_rate=1e-6, warmup_share=0)
    run = Trainer(model, config, read_token_rows(toy_tokens, "train"))
    before = run.trained.master.detach().clone()
    run.train_step()
    assert not torch.equal(before, run.trained.master.detach())
    rounded = run.trained.views(run.trained.master.detach().to(torch.bfloat16))
    assert all(torch.equal(one, other) for one, other in zip(rounded, trained_values(run), strict=True))


def test_loss_that_is_not_finite_stops_and_names_the_rows(toy_base: Path, toy_tokens: Path) -> None:
    run = trainer(toy_base, toy_tokens, batch_rows=3)
    run.trained.master.data.fill_(float("nan"))
    run.trained.publish()
    rows = sorted(run.rows[index].row for index in run.plan.rows_of_step(0))
    with pytest.raises(ConfigError, match=f"step 1: the loss is nan.*{rows}".replace("[", r"\[").replace("]", r"\]")):
        run.train_step()


@pytest.mark.parametrize(("dropout", "optimizer"), [(0.0, "adamw"), (0.3, "adamw"), (0.0, "sgd")])
def test_resumed_steps_are_bit_identical(toy_base: Path, toy_tokens: Path, dropout: float, optimizer: Any) -> None:
    lora = LORA.model_copy(update={"dropout": dropout})
    whole, first, second = (trainer(toy_base, toy_tokens, lora=lora, optimizer=optimizer) for _ in range(3))
    for _ in range(4):
        whole.train_step()
    for _ in range(2):
        first.train_step()
    second.restore(first.state({}))
    for _ in range(2):
        second.train_step()
    assert torch.equal(whole.trained.master, second.trained.master)


def test_sgd_steps_are_momentum_times_the_rate(toy_base: Path, toy_tokens: Path) -> None:
    run = trainer(toy_base, toy_tokens, optimizer="sgd", learning_rate=0.1, schedule="constant", warmup_share=0)
    velocity = torch.zeros_like(run.trained.master)
    for _ in range(2):
        before = run.trained.master.detach().clone()
        run.train_step()
        velocity = 0.9 * velocity + run.trained.gradient
        assert torch.allclose(run.trained.master.detach(), before - 0.1 * velocity, atol=1e-7)


def test_early_stop_ends_the_run_and_keeps_the_adapter_of_the_lowest_loss(toy_base: Path, toy_tokens: Path, tmp_path: Path) -> None:
    """A rate of 0.3 makes the loss jump about from the start, so a new lowest one soon fails to come."""
    config = TrainConfig(
        precision="fp32", lora=LORA, batch_rows=5, epochs=8, learning_rate=0.3, schedule="constant", eval_steps=1, early_stop_evals=2
    )
    job = FinetuneJob(output_dir=tmp_path / "out", base_dir=toy_base, tokens_dir=toy_tokens, train=config)
    model = load_base(toy_base, torch.float32)
    attach_adapter(model, FACTS)
    initialize(model, 0)
    run = Trainer(model, config, read_token_rows(toy_tokens, "train"))
    recorder = Recorder(job, run)
    train_to_end(run, recorder, job, open_store(job, [], run, "fp32"))
    losses = [loss for _, loss in recorder.history["heldout_loss"]]
    assert run.step == len(losses) == losses.index(min(losses)) + 3 < run.total_steps
    assert run.evaluate(read_token_rows(toy_tokens, "heldout")) == pytest.approx(min(losses), rel=1e-6)
    assert losses[-1] > min(losses) * 1.001


def test_remembered_adapter_survives_a_resume(toy_base: Path, toy_tokens: Path) -> None:
    first, second = trainer(toy_base, toy_tokens), trainer(toy_base, toy_tokens)
    first.train_step()
    first.remember()
    kept = first.trained.master.detach().clone()
    first.train_step()
    second.restore(first.state({}))
    assert not torch.equal(second.trained.master, kept)
    second.recall()
    assert torch.equal(second.trained.master, kept)
    assert all(torch.equal(one, other) for one, other in zip(second.trained.views(kept), trained_values(second), strict=True))


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}], ids=["lora", "rslora", "dora"])
def test_adapter_files_load_in_peft_with_the_same_logits(
    toy_base: Path, toy_tokens: Path, tmp_path: Path, options: dict[str, bool]
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    lora = LORA.model_copy(update=options)
    run = trainer(toy_base, toy_tokens, lora=lora)
    run.train_step()
    job = FinetuneJob(output_dir=tmp_path, base_dir=toy_base, tokens_dir=toy_tokens, train=run.config)
    write_result(run, job)
    peft_model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(toy_base, dtype=torch.float32), tmp_path)
    own = load_base(toy_base, torch.float32, "eager")
    attach_adapter(own, adapter_facts(lora))
    load_tensors(own, load_file(tmp_path / ADAPTER_NAME))
    ids = torch.tensor([run.rows[0].ids])
    with torch.no_grad():
        assert torch.allclose(peft_model(input_ids=ids).logits, own(input_ids=ids).logits, atol=1e-4)


def test_adapter_that_does_not_fit_the_model_is_refused(toy_base: Path) -> None:
    model = adapted(toy_base)
    tensors = {peft_name(name): value for name, value in TrainableParameters(model).whole_tensors().items()}
    name = next(iter(tensors))
    for wrong in ({**tensors, "left.over": tensors[name]}, {**tensors, name: tensors[name][:1]}, {}):
        with pytest.raises(ArtifactError, match="do not fit"):
            load_tensors(model, wrong)


def test_unknown_target_module_names_the_layers_that_exist(toy_base: Path, toy_tokens: Path, tmp_path: Path) -> None:
    lora = LoraConfig(target_modules=("q_proj", "qkv_proj", "lm_head"))
    job = FinetuneJob(output_dir=tmp_path, base_dir=toy_base, tokens_dir=toy_tokens, train=TrainConfig(lora=lora))
    with pytest.raises(ConfigError) as caught:
        count_trained(job)
    assert "['lm_head', 'qkv_proj']" in caught.value.message
    assert "gate_proj" in caught.value.message


def test_adapter_size_from_headers_equals_what_is_trained(toy_base: Path, toy_tokens: Path, tmp_path: Path) -> None:
    job = FinetuneJob(output_dir=tmp_path, base_dir=toy_base, tokens_dir=toy_tokens, train=TrainConfig(lora=LORA))
    assert count_trained(job) == TrainableParameters(adapted(toy_base)).master.numel()


def test_model_of_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    from transformers import GPT2Config

    GPT2Config(n_layer=1).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="'gpt2'"):
        load_base(tmp_path, torch.float32)
