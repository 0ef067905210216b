"""Packed attention, joint products and the gated product give what their plain definitions give, forward and backward."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from infra.contracts import AdapterFacts
from training import generate
from training.attention import PackView, attend, flex_attend, num_positions
from training.blocks import GatedProduct
from training.data.tokens import TokenRow, read_token_rows
from training.lora import LoraLinear, joint_product, stack, stacked_weights
from training.model import PackModel, attach_adapter, load_base
from training.packing import PREFIX_ROW, Pack, make_pack

HEADS, KV_HEADS, DIM = 4, 2, 8
SCALING = DIM**-0.5
FACTS = AdapterFacts(rank=4, alpha=8, target_modules=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"))
TOLERANCE = 1e-5  # sums of fp32 numbers of size one in another order


def token_rows(count: int, shared: int) -> list[TokenRow]:
    """Rows of 5, 6, ... own tokens after a common beginning."""
    rows = []
    for number in range(count):
        ids = (*range(10, 10 + shared), *(100 + 20 * number + place for place in range(5 + number)))
        rows.append(TokenRow(number, ids, (*[False] * (len(ids) - 2), True, True)))
    return rows


def tables(pack: Pack) -> tuple[Tensor, Tensor]:
    """cos and sin of rotary positions, as transformers lays them out."""
    angles = torch.arange(num_positions(pack))[:, None] * 10_000 ** (-torch.arange(0, DIM, 2) / DIM)
    return torch.cat([angles, angles], dim=-1).cos(), torch.cat([angles, angles], dim=-1).sin()


def plain_attention(x: Tensor, pack: Pack) -> Tensor:
    """The definition: one mask over all tokens, positions by transformers' own function."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    cos, sin = (table[pack.positions] for table in tables(pack))
    q, k, v = x.view(1, len(x), -1, DIM).transpose(1, 2).split([HEADS, KV_HEADS, KV_HEADS], dim=1)
    q, k = apply_rotary_pos_emb(q, k, cos, sin)
    rows, positions = pack.token_rows, pack.positions[0]
    is_seen = ((rows == PREFIX_ROW) | (rows[:, None] == rows)) & (positions <= positions[:, None])
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=is_seen, scale=SCALING, enable_gqa=True)
    return out[0].transpose(0, 1).flatten(1)


@pytest.mark.parametrize("shared", [0, 7], ids=["no-prefix", "prefix"])
@pytest.mark.parametrize("multiple", [1, 16])
@pytest.mark.parametrize("count", [1, 3])
def test_attention_over_a_pack_equals_one_mask_over_all_tokens(count: int, multiple: int, shared: int) -> None:
    pack = make_pack(token_rows(count, shared), multiple)
    assert (pack.prefix_tokens > 0) == (count > 1 and shared > 0)
    torch.manual_seed(0)
    x = torch.randn(pack.ids.shape[1], (HEADS + 2 * KV_HEADS) * DIM, requires_grad=True)
    weight = torch.randn(len(x), HEADS * DIM)
    weight[pack.token_rows == count] = 0  # nothing looks at filler
    found = attend(x, HEADS, KV_HEADS, PackView(pack, *tables(pack)), SCALING)
    expected = plain_attention(x, pack)
    real = pack.token_rows < count
    assert torch.allclose(found[real], expected[real], atol=TOLERANCE)
    gradients = [torch.autograd.grad((out * weight).sum(), x)[0] for out in (found, expected)]
    assert torch.allclose(*gradients, atol=TOLERANCE)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_equals_packed_attention() -> None:
    pack = make_pack(token_rows(3, 7), 16)
    torch.manual_seed(0)
    x = torch.randn(pack.ids.shape[1], (HEADS + 2 * KV_HEADS) * DIM)
    view = PackView(pack, *tables(pack))
    real = pack.token_rows < 3
    found, expected = flex_attend(x, HEADS, KV_HEADS, view, SCALING), attend(x, HEADS, KV_HEADS, view, SCALING)
    assert torch.allclose(found[real], expected[real], atol=TOLERANCE)


def test_gradients_of_a_row_do_not_depend_on_its_neighbours(toy_base: Path, toy_tokens: Path) -> None:
    rows = read_token_rows(toy_tokens, "train")[:5]
    others = [TokenRow(row.row, (*row.ids[:-9], *([50 + row.row] * 9)), row.supervised) for row in rows[1:]]
    found = []
    for neighbours in ([], rows[1:], others):
        model = load_base(toy_base, torch.float32)
        attach_adapter(model, FACTS)
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(parameter.numel()))
        pack = make_pack([rows[0], *neighbours])
        losses = PackModel(model)(pack)
        losses[pack.target_rows == 0].sum().backward()
        found.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.requires_grad]))
    alone, *together = found
    for gradient in together:
        assert float((gradient - alone).abs().max()) < TOLERANCE * float(alone.abs().max())
    assert float(alone.abs().max()) > 0


def layers(use_dora: bool, bias: bool) -> list[LoraLinear]:
    """Three layers of 6 inputs and 5, 3 and 3 outputs with adapters that are not zero."""
    facts = FACTS.model_copy(update={"use_dora": use_dora, "rank": 2})
    made = []
    for width in (5, 3, 3):
        layer = LoraLinear(torch.nn.Linear(6, width, bias=bias).requires_grad_(False), facts, 0.0, torch.float32)
        for factor in (layer.lora_A, layer.lora_B):
            factor.data.normal_()
        made.append(layer)
    return made


def plain_layer(layer: LoraLinear, x: Tensor) -> Tensor:
    """The definition, with the adapted weight formed; DoRA takes its norm for a constant."""
    weight = layer.weight + layer.scale * layer.lora_B @ layer.lora_A
    if layer.lora_magnitude_vector is not None:
        weight = weight * (layer.lora_magnitude_vector / weight.detach().norm(dim=1))[:, None]
    return torch.nn.functional.linear(x, weight, layer.bias)


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_joint_product_equals_the_definition_of_each_layer(use_dora: bool, bias: bool) -> None:
    torch.manual_seed(0)
    joined = layers(use_dora, bias)
    x, weight = torch.randn(4, 6, requires_grad=True), torch.randn(4, 11)
    trained = [x, *(parameter for layer in joined for parameter in layer.parameters() if parameter.requires_grad)]
    found, expected = joint_product(x, joined), torch.cat([plain_layer(layer, x) for layer in joined], dim=-1)
    assert torch.allclose(found, expected, atol=TOLERANCE)
    for one, other in zip(*(torch.autograd.grad((y * weight).sum(), trained) for y in (found, expected)), strict=True):
        assert torch.allclose(one, other, atol=TOLERANCE)


def test_stacked_weights_share_memory_and_others_are_copied() -> None:
    torch.manual_seed(0)
    joined = layers(use_dora=False, bias=False)
    expected = torch.cat([layer.weight for layer in joined])
    assert torch.equal(stacked_weights(joined, torch.float32), expected)
    stack(joined)
    found = stacked_weights(joined, torch.float32)
    assert torch.equal(found, expected)
    assert found.data_ptr() == joined[0].weight.data_ptr()
    assert stacked_weights(joined[::-1], torch.float32).data_ptr() != joined[-1].weight.data_ptr()


def test_loaded_model_has_its_joint_weights_in_one_piece(toy_base: Path) -> None:
    for name in (generate.NAME, "eager"):
        attention = load_base(toy_base, torch.float32, name).model.layers[1].self_attn
        q, k = attention.q_proj.weight, attention.k_proj.weight
        assert (q.data_ptr() + q.nbytes == k.data_ptr() and q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr()) == (
            name == generate.NAME
        )


def test_gated_product_equals_autograd() -> None:
    torch.manual_seed(0)
    both, weight = torch.randn(5, 14, requires_grad=True), torch.randn(5, 7)
    gate, up = both.chunk(2, dim=-1)
    found, expected = GatedProduct.apply(both), torch.nn.functional.silu(gate) * up
    assert torch.allclose(found, expected, atol=TOLERANCE)
    gradients = [torch.autograd.grad((y * weight).sum(), both)[0] for y in (found, expected)]
    assert torch.allclose(*gradients, atol=TOLERANCE)
