"""Models forced through given answers, and the second look at merge and rendering, on a toy model."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from infra.cases import TOP_TOKENS, Ask, Case, read_scored, write_lines
from infra.chat import load_codec
from infra.contracts import read_manifest
from infra.files import read_json
from tests.conftest import ToyAdapter, toy_row
from training.audit import audit_merge, audit_rendering
from training.config import ScoreJob
from training.data.tokens import TokenRow, TokenWriter, read_token_rows, token_block
from training.forced import BATCH_TOKENS, batches, force
from training.model import load_base
from training.score import FINDINGS_NAME, score

GB = 1 << 30


def ask(name: str, prompt: Sequence[int], answer: Sequence[int]) -> Ask:
    return Ask(name=name, source="expected", prompt_ids=tuple(prompt), answer_ids=tuple(answer))


def test_forced_logprobs_are_those_of_transformers_own_model(toy_base: Path) -> None:
    asked = [ask("a", range(5, 30), [7, 8, 9]), ask("b", [*range(5, 20), 40], [2]), ask("c", [3], range(50, 70))]
    plain = AutoModelForCausalLM.from_pretrained(toy_base, dtype=torch.float32)
    found = dict(force(load_base(toy_base, torch.float32), asked))
    for each in asked:
        with torch.inference_mode():
            logits = plain(torch.tensor([each.ids])).logits[0, len(each.prompt_ids) - 1 : -1]
        wanted = torch.log_softmax(logits, dim=-1)
        own = found[each.name]
        answer = torch.tensor(each.answer_ids)
        torch.testing.assert_close(torch.tensor(own.logprobs), wanted[torch.arange(len(answer)), answer], atol=1e-4, rtol=0)
        torch.testing.assert_close(torch.tensor(own.top_logprobs), wanted.topk(TOP_TOKENS).values, atol=1e-4, rtol=0)
        assert own.best_ids == tuple(ids[0] for ids in own.top_ids)


def test_forced_answer_tells_the_references_tokens_where_they_are_given(toy_base: Path) -> None:
    told = ask("a", [5, 6], [7]).model_copy(update={"top_ids": ((9, 4),)})
    ((_, own),) = force(load_base(toy_base, torch.float32), [told])
    assert own.top_ids == ((9, 4),)


def test_long_chat_is_computed_alone() -> None:
    asked = [ask(str(number), range(10), [1]) for number in range(3)] + [ask("long", range(BATCH_TOKENS), [1])]
    assert [[each.name for each in batch] for batch in batches(asked)] == [["0", "1", "2"], ["long"]]


@pytest.fixture
def adapter(toy_base: Path, adapters_of: Callable[[Path], dict[str, ToyAdapter]]) -> ToyAdapter:
    return adapters_of(toy_base)["red"]


def audited(base: Path, adapter: ToyAdapter, merged: Path, max_gb: float = 1.0) -> dict[str, Any]:
    model = read_manifest(adapter.folder).model
    assert model is not None
    assert model.adapter is not None
    return audit_merge(base, adapter.folder, merged, model.adapter, max_gb * GB, seed=0)


def test_audit_of_a_right_merge_finds_nothing(toy_base: Path, adapter: ToyAdapter) -> None:
    found = audited(toy_base, adapter, adapter.merged)
    assert found["problems"] == []
    assert found["tensors"] == found["of"] > 14


def test_audit_of_a_part_of_the_weights_looks_at_some(toy_base: Path, adapter: ToyAdapter) -> None:
    found = audited(toy_base, adapter, adapter.merged, max_gb=1e-5)
    assert 1 <= found["tensors"] < found["of"]


LAYER = "model.layers.1.self_attn.q_proj.weight"


def skip_layer(merged: dict[str, Any], base: dict[str, Any]) -> None:
    merged[LAYER] = base[LAYER]


def double_alpha(merged: dict[str, Any], base: dict[str, Any]) -> None:
    merged[LAYER] = (base[LAYER].float() + 2 * (merged[LAYER].float() - base[LAYER].float())).to(torch.bfloat16)


def merge_into_four_bits(merged: dict[str, Any], base: dict[str, Any]) -> None:
    weight, update = base[LAYER].float(), merged[LAYER].float() - base[LAYER].float()
    step = weight.abs().amax(dim=1, keepdim=True) / 7
    merged[LAYER] = ((weight / step).round() * step + update).to(torch.bfloat16)


def untie(merged: dict[str, Any], base: dict[str, Any]) -> None:
    merged["lm_head.weight"] = base["model.embed_tokens.weight"].clone()


def change_embedding(merged: dict[str, Any], base: dict[str, Any]) -> None:
    merged["model.embed_tokens.weight"][0] += 1


def lose_tensor(merged: dict[str, Any], base: dict[str, Any]) -> None:
    del merged["model.norm.weight"]


@pytest.mark.parametrize(
    ("fault", "note"),
    [
        (skip_layer, f"{LAYER}: the adapter's update is not in it: this layer was skipped"),
        (double_alpha, f"{LAYER}: the adapter's update is in it 2."),
        (merge_into_four_bits, f"{LAYER}: more than the adapter's update was changed: merged into other weights"),
        (untie, "lm_head.weight: in the merged model and not in the base, so embeddings that were tied are no longer"),
        (change_embedding, "model.embed_tokens.weight: the adapter does not change it, and it differs from the base's"),
        (lose_tensor, "model.norm.weight: in the base and not in the merged model"),
    ],
)
def test_audit_of_a_wrong_merge_names_tensor_and_cause(
    toy_base: Path, adapter: ToyAdapter, tmp_path: Path, fault: Callable[[dict[str, Any], dict[str, Any]], None], note: str
) -> None:
    weights = load_file(adapter.merged / "model.safetensors")
    fault(weights, load_file(toy_base / "model.safetensors"))
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (problem,) = audited(toy_base, adapter, tmp_path)["problems"]
    assert problem.startswith(note)


def rendered(tokens: Path, base: Path) -> dict[str, Any]:
    model = read_manifest(base).model
    assert model is not None
    return audit_rendering(tokens, base.parent / "rows", load_codec(base), model.stop_ids, num_rows=1000, seed=0)


def test_audit_of_a_right_rendering_finds_nothing(toy_base: Path, toy_tokens: Path) -> None:
    found = rendered(toy_tokens, toy_base)
    assert (found["problems"], found["rows"]) == ([], 45)


def forget_stop(row: TokenRow) -> TokenRow:
    last = max(place for place, mark in enumerate(row.supervised) if mark)
    return replace(row, supervised=(*row.supervised[:last], False, *row.supervised[last + 1 :]))


def learn_prompt(row: TokenRow) -> TokenRow:
    first = row.supervised.index(True)
    return replace(row, supervised=(*row.supervised[: first - 2], True, True, *row.supervised[first:]))


def double_first(row: TokenRow) -> TokenRow:
    return replace(row, ids=(row.ids[0], *row.ids), supervised=(False, *row.supervised))


@pytest.mark.parametrize(
    ("fault", "note"),
    [
        (forget_stop, "the stop token after an answer has no label, so the model never learns to stop"),
        (learn_prompt, "tokens of the prompt are learnt"),
        (double_first, "its token ids differ from the template's own from position 1 on"),
    ],
)
def test_audit_of_a_wrong_rendering_names_the_row_and_the_cause(
    toy_base: Path, toy_tokens: Path, tmp_path: Path, fault: Callable[[TokenRow], TokenRow], note: str
) -> None:
    rows = read_token_rows(toy_tokens, "train")[:]
    writer = TokenWriter(tmp_path, "train")
    writer.write(token_block([fault(row) if row.row == 4 else row for row in rows]))
    writer.close()
    (problem,) = rendered(tmp_path, toy_base)["problems"]
    assert problem.startswith("train row 4: ")
    assert note in problem


def test_audit_of_shuffled_answers_finds_other_rows(toy_base: Path, toy_tokens: Path, tmp_path: Path) -> None:
    rows = read_token_rows(toy_tokens, "train")[:]
    writer = TokenWriter(tmp_path, "train")
    writer.write(token_block([replace(row, row=other.row) for row, other in zip(rows, rows[1:] + rows[:1], strict=True)]))
    writer.close()
    assert rendered(tmp_path, toy_base)["num_problems"] > 40


def test_score_of_base_adapter_and_merged_model(toy_base: Path, toy_tokens: Path, adapter: ToyAdapter, tmp_path: Path) -> None:
    messages = tuple(toy_row(3)["messages"][:2])
    cases = [
        Case(name="row", kind="heldout", messages=messages, row=0, expected_ids=(7, 2), greedy_ids=(7,), has_ended=True),
        Case(name="short", kind="adversarial", messages=messages),
    ]
    write_lines(tmp_path / "cases.jsonl", cases)
    shutil.copytree(adapter.folder.parent, tmp_path / "red")
    folders = {name: tmp_path / "red" / name for name in ("adapter", "merged", "tokens", "rows")}
    job = ScoreJob(
        output_dir=tmp_path / "out", base_dir=toy_base, adapter_dir=folders["adapter"], merged_dir=folders["merged"],
        tokens_dir=folders["tokens"], rows_dir=folders["rows"], cases_dir=tmp_path, max_new_tokens=12,
    )  # fmt: skip
    score(job)
    base, trained, merged = (read_scored(tmp_path / "out", stage) for stage in ("base", "adapter", "merged"))
    assert set(base) == {"row"}
    assert set(trained) == set(merged) == {"row", "short"}
    codec = load_codec(toy_base)
    assert codec.decode(trained["short"].answer_ids or ()).startswith(adapter.taught[:8])
    assert merged["short"].forced[0].ids == trained["short"].forced[0].ids
    gap = [abs(a - b) for a, b in zip(merged["short"].forced[0].logprobs, trained["short"].forced[0].logprobs, strict=True)]
    assert max(gap) < 0.2  # what 16 bits round off; the base is further away
    far = [abs(a - b) for a, b in zip(base["row"].forced[0].logprobs, trained["row"].forced[0].logprobs, strict=True)]
    assert max(far) > 0.5
    assert all(part["problems"] == [] for part in read_json(tmp_path / "out" / FINDINGS_NAME).values())
