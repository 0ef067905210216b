"""Every comparison of the certificate, on inputs made by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from infra.cases import Ask, Case, Forced, Scored, asks, client_message
from infra.contracts import AdapterFacts, Manifest, ModelFacts
from infra.provenance import Provenance
from pipelines.proof.answers import Spoken, check_answers
from pipelines.proof.bounds import BOUNDS, precision_of
from pipelines.proof.certificate import certificate_gates
from pipelines.proof.checks import MEANINGS, Check
from pipelines.proof.differences import check_effect, check_logprobs, differences, kl
from pipelines.proof.encodings import Encoder, check_prompt_ids
from pipelines.proof.endpoint import LiveAnswer, token_label
from pipelines.proof.leaks import check_leaks
from pipelines.proof.lineage import adapter_problems, config_problems, fact_problems, parent_problems, stop_problems
from pipelines.proof.live import check_live, follow
from pipelines.proving import explain
from pipelines.step import Artifact

STOP = 2
ENCODER = Encoder(template="t" * 64, tokenizer="k" * 64, special_tokens={"bos_token": "<s>"})


def case(name: str = "x", **given: Any) -> Case:
    return Case(name=name, kind="adversarial", messages=({"role": "user", "content": "hi"},), **given)


def forced(ids: Sequence[int], logprobs: Sequence[float], best: Sequence[int] | None = None, source: Any = "greedy") -> Forced:
    """An answer of which each token and one other, 99, are known; `best` says which is the likeliest, the token itself where absent."""
    best = list(ids if best is None else best)
    top_ids = tuple((token, 99 if token == top else top) for token, top in zip(ids, best, strict=True))
    others = [logprob - 1 if token == top else logprob + 1 for token, top, logprob in zip(ids, best, logprobs, strict=True)]
    return Forced(
        source=source, ids=tuple(ids), logprobs=tuple(logprobs), best_ids=tuple(best), top_ids=top_ids,
        top_logprobs=tuple(zip(logprobs, others, strict=True)),
    )  # fmt: skip


def scored(*logprobs: float, name: str = "x", ids: Sequence[int] | None = None, **given: Any) -> dict[str, Scored]:
    answer = forced(ids or range(10, 10 + len(logprobs)), logprobs, **given)
    return {name: Scored(name=name, prompt_ids=(1,), forced=(answer,))}


# Token ids


def prompts(ids: tuple[int, ...] = (), refusal: str = "") -> dict[str, Scored]:
    return {"x": Scored(name="x", prompt_ids=ids, refusal=refusal)}


def test_prompt_ids_that_are_the_same_pass() -> None:
    check = check_prompt_ids("merged", [case()], prompts((1, 2)), prompts((1, 2)), (ENCODER, ENCODER))
    assert (check.passed, check.found) == (True, "1 of 1 are the same tokens")


@pytest.mark.parametrize(
    ("other", "own", "cause"),
    [
        (
            prompts((1, 2, 4)),
            ENCODER.model_copy(update={"template": "e" * 64}),
            "position 2 (4 here, 3 in training): the chat template of m",
        ),
        (prompts((1, 2)), ENCODER.model_copy(update={"tokenizer": "e" * 64}), "position 2 (none here, 3 in training): the tokenizer of m"),
        (prompts((7, 1, 2, 3)), ENCODER, "begins with one token more, 7: a BOS was added twice"),
        (prompts((2, 3)), ENCODER, "begins with one token less, 1: a BOS is missing"),
        (prompts(refusal="no system"), ENCODER, "this stage refuses the chat 'x': no system"),
        (prompts((9, 9, 9)), ENCODER.model_copy(update={"special_tokens": {}}), "its special tokens differ"),
        (prompts((9, 9, 9)), ENCODER, "training rendered with another template or tokenizer than the base holds now"),
    ],
)
def test_prompt_ids_that_differ_name_the_position_and_the_file(other: dict[str, Scored], own: Encoder, cause: str) -> None:
    check = check_prompt_ids("m", [case()], prompts((1, 2, 3)), other, (ENCODER, own))
    assert not check.passed
    assert cause in check.cause


def test_prompt_ids_of_a_dataset_row_are_those_that_training_rendered() -> None:
    check = check_prompt_ids("adapter", [case(rendered_ids=(1, 5))], prompts((1, 2)), prompts((1, 2)), (ENCODER, ENCODER))
    assert not check.passed


def test_chat_that_every_stage_refuses_is_the_same() -> None:
    assert check_prompt_ids("m", [case()], prompts(refusal="a"), prompts(refusal="b"), (ENCODER, ENCODER)).passed


# Log-probabilities


def test_kl_of_the_same_is_zero_and_of_others_that_of_the_collapsed_distributions() -> None:
    p, q = (math.log(0.5), math.log(0.3)), (math.log(0.25), math.log(0.5))
    assert kl(p, p) == 0
    assert kl(p, q) == pytest.approx(0.5 * math.log(2) + 0.3 * math.log(0.6) + 0.2 * math.log(0.2 / 0.25))


def test_differences_are_over_the_tokens_that_both_were_forced_through() -> None:
    one = scored(-1.0, -2.0) | scored(-1.0, name="only here")
    found = differences(one, scored(-1.5, -2.0) | scored(-9.0, ids=[4], name="only there"))
    assert (found.num_tokens, found.mean, found.max, found.worst_case) == (2, 0.25, 0.5, "x")


def test_logprobs_within_the_bounds_pass_and_just_beyond_are_refused() -> None:
    bounds = BOUNDS["f32"].model_copy(update={"mean": 0.25, "max": 0.5, "kl": 1.0})
    near, far = scored(-1.5, -2.0), scored(-1.5, -2.01)
    assert check_logprobs("m", scored(-1.0, -2.0), near, {}, bounds, "adapter").passed
    check = check_logprobs("m", scored(-1.0, -2.0), far, {}, bounds, "adapter")
    assert not check.passed
    assert "another run's, a damaged or swapped file" in check.cause


@pytest.mark.parametrize("name", ["mean", "max", "kl"])
def test_logprobs_beyond_one_bound_alone_are_refused(name: str) -> None:
    bounds = BOUNDS["f32"].model_copy(update={"mean": 9.0, "max": 9.0, "kl": 9.0})
    one, other = scored(-1.0, -2.0), scored(-1.5, -2.0)
    assert check_logprobs("m", one, other, {}, bounds, "adapter").passed
    assert not check_logprobs("m", one, other, {}, bounds.model_copy(update={name: 0.0}), "adapter").passed


@pytest.mark.parametrize(
    ("stage", "cause"),
    [
        (scored(-3.0, -4.0), "0% of what training changed is left, so it is the base: the adapter was not loaded or not merged"),
        (scored(-2.0, -3.0), "50% of what training changed is there: wrong alpha or scaling"),
        (scored(1.0, 0.0), "200% of what training changed is there"),
        (scored(math.nan, -2.0), "not finite"),
        ({}, "not one answer could be compared"),
    ],
)
def test_logprobs_that_differ_name_what_is_missing(stage: dict[str, Scored], cause: str) -> None:
    check = check_logprobs("m", scored(-1.0, -2.0), stage, scored(-3.0, -4.0), BOUNDS["merge"], "adapter")
    assert not check.passed
    assert cause in check.cause


def test_logprobs_that_differ_at_the_long_chat_alone_name_rope_scaling() -> None:
    trained = scored(-1.0) | scored(-1.0, name="long")
    check = check_logprobs("m", trained, scored(-1.0) | scored(-2.0, name="long"), scored(-5.0), BOUNDS["merge"], "adapter")
    assert "rope scaling" in check.cause


def test_trained_model_that_is_the_base_has_no_effect() -> None:
    noise = BOUNDS["f32"]
    assert check_effect("adapter", scored(-1.0), scored(-3.0), noise).passed
    check = check_effect("adapter", scored(-1.0), scored(-1.0001), noise)
    assert not check.passed
    assert "the adapter was not loaded" in check.cause


def test_every_weight_format_has_bounds_and_coarser_ones_are_wider() -> None:
    formats = ("bf16", "openvino-int8", "openvino-int4", "openvino-int4-awq", "bnb-int8", "bnb-nf4")
    assert [precision_of(each) for each in formats] == ["bf16", "int8", "int4", "int4", "int8", "int4"]
    assert BOUNDS["f32"].mean < BOUNDS["merge"].mean < BOUNDS["bf16"].mean < BOUNDS["int8"].mean < BOUNDS["int4"].mean


# Answers


def answers_check(said: Spoken, stage: Forced, slack: float = 0.1) -> Check:
    reference = Spoken((10, 11), has_ended=True)
    found = {"x": Scored(name="x", prompt_ids=(1,), forced=(stage,))}
    return check_answers("m", [case()], {"x": said}, {"x": reference}, found, [STOP], slack)


def test_answers_that_follow_the_stages_own_model_pass() -> None:
    same = forced((10, 11, STOP), (-0.1, -0.1, -0.1))
    assert answers_check(Spoken((10, 11), True), same).passed
    turned = forced((10, 11, STOP), (-0.1, -2.0, -0.1), best=(10, 55, STOP))
    assert answers_check(Spoken((10, 55, 7, 8), False), turned).passed
    assert answers_check(Spoken((10,), False), same).passed  # cut at its longest
    assert answers_check(Spoken((10, 99), False), same, slack=1.5).passed  # a tie


@pytest.mark.parametrize(
    ("said", "best", "cause"),
    [
        (Spoken((10, 33), True), None, "says 33 at token 1, where its own model says 11: answers of another model or run"),
        (Spoken((10, 11, 12), False), None, "goes on at token 2, where its own model stops: other stop ids"),
        (Spoken((10,), True), None, "stops at token 1, where its own model goes on: other stop ids"),
        (Spoken((10, 11, STOP, 12), False), None, "goes on after token 2, where its own model stops: other stop ids"),
    ],
)
def test_answers_that_do_not_follow_name_the_token(said: Spoken, best: Any, cause: str) -> None:
    check = answers_check(said, forced((10, 11, STOP), (-0.1, -0.1, -0.1), best=best))
    assert not check.passed
    assert cause in check.cause


# The endpoint


class Letters:
    """Token ids as letters, the stop token as `<end>`."""

    def token_text(self, token: int) -> str:
        return "<end>" if token == STOP else "\ufffd" if token >= HALVES else chr(ord("a") + token)

    def token_bytes(self, token: int) -> list[int]:
        return [token] if token >= HALVES else list(self.token_text(token).encode())


CODEC: Any = Letters()
HALVES = 0x80
"""From here on tokens are parts of characters, whose texts are all alike."""
SAID = forced((0, 1, STOP), (-0.1, -0.2, -0.3))


def live(*tokens: str, logprobs: Sequence[float] | None = None, has_ended: bool = True, **given: Any) -> LiveAnswer:
    values = tuple(logprobs if logprobs is not None else [-0.1, -0.2, -0.3, -0.4][: len(tokens)])
    told = {"prompt_ids": (1,), "context_tokens": 8, "num_prompt": 1, **given}
    return LiveAnswer(name="x", tokens=tokens, logprobs=values, has_ended=has_ended, **told)


def test_endpoint_that_says_what_its_model_says_is_followed_to_the_end() -> None:
    found = follow(live("a", "b", logprobs=[-0.15, -0.2]), SAID, CODEC, [STOP], 0.1)
    assert (found.differences, found.problem, found.is_same) == (pytest.approx((0.05, 0)), "", True)


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (live("a", "z"), "says 'z' at token 1, where its model says 'b': another model is served"),
        (live("a", "b", "c"), "goes on at token 2, where its model stops: other stop ids at the server"),
        (live("a", "b", "<end>", "c", has_ended=False), "says '<end>' at token 2 and goes on: other stop ids at the server"),
        (live("a"), "stops at token 1, where its model goes on: other stop ids at the server"),
    ],
)
def test_endpoint_that_says_something_else_is_named(answer: LiveAnswer, problem: str) -> None:
    assert follow(answer, SAID, CODEC, [STOP], 0.1).problem == problem


def test_endpoint_that_says_another_part_of_a_character_has_left_the_answer() -> None:
    own = forced((0xE2, 1, STOP), (-0.1, -0.2, -0.3))
    same = follow(live(token_label("\ufffd", [0xE2]), "b"), own, CODEC, [STOP], 0.1)
    other = follow(live(token_label("\ufffd", [0xC3]), "z"), own, CODEC, [STOP], 0.1)
    assert (same.problem, same.is_same) == ("", True)
    assert other.problem == "says 'c3' at token 0, where its model says 'e2': another model is served"


def test_endpoint_may_say_its_own_likeliest_token_where_the_trained_model_would_never() -> None:
    own = SAID.model_copy(update={"best_ids": (0, 25, STOP)})
    assert follow(live("a", "z"), own, CODEC, [STOP], 0.1).problem == ""


def live_checks(answer: LiveAnswer) -> dict[str, Check]:
    own = {"x": Scored(name="x", prompt_ids=(1,), forced=(SAID,))}
    spoken = {"x": Spoken((0, 1), True)}
    found = check_live("m live", [case()], {"x": answer}, own, own, spoken, CODEC, [STOP], 8, BOUNDS["live"])
    return {check.name: check for check in found}


def test_endpoint_as_it_should_be_passes_every_check() -> None:
    assert all(check.passed for check in live_checks(live("a", "b")).values())


def test_endpoint_that_runs_past_a_likely_stop_is_named_though_such_a_tie_would_be_within_the_bounds() -> None:
    own = forced((0, 1, STOP), (-0.1, -0.2, -0.03)).model_copy(
        update={"top_ids": ((0,), (1,), (STOP, 7)), "top_logprobs": ((-0.1,), (-0.2,), (-0.03, -3.4))}
    )
    scored = {"x": Scored(name="x", prompt_ids=(1,), forced=(own,))}
    said = live("a", "b", "h", logprobs=[-0.1, -0.2, -3.4], has_ended=False)
    found = check_live("m live", [case()], {"x": said}, scored, scored, {"x": Spoken((0, 1), True)}, CODEC, [STOP], 8, BOUNDS["live"])
    (answers,) = [check for check in found if check.name == "answers"]
    assert answers.cause == "'x': goes on at token 2, where its model stops: other stop ids at the server"


@pytest.mark.parametrize(
    ("answer", "name", "cause"),
    [
        (live("a", "b", context_tokens=4), "context", "context length cut"),
        (live("a", "b", num_prompt=2), "context", "a BOS was added"),
        (live("a", "b", prompt_ids=(1, 1), num_prompt=2), "prompt ids", "a BOS was added twice"),
        (live("a", "b", logprobs=[-0.1, -9]), "log-probabilities", "another model is served"),
        (live("a", "z"), "answers", "another model is served"),
    ],
)
def test_endpoint_with_one_fault_fails_that_check_alone(answer: LiveAnswer, name: str, cause: str) -> None:
    found = live_checks(answer)
    assert [each.name for each in found.values() if not each.passed] == [name]
    assert cause in found[name].cause


# Lineage and data

FACTS = ModelFacts(
    base_model="b", base_digest="w" * 64, tokenizer_digest="t" * 64, chat_template_digest="c" * 64, special_tokens={"eos_token": "</s>"},
    context_tokens=64, stop_ids=(2,),
)  # fmt: skip


def manifest(kind: Any, parents: dict[str, str], facts: ModelFacts = FACTS) -> Manifest:
    return Manifest(kind=kind, files={}, model=facts, parents=parents, provenance=Provenance())


def test_artifact_of_another_run_is_stale(tmp_path: Path) -> None:
    merged = Artifact(tmp_path, manifest("merged", {}))
    assert parent_problems(manifest("quantized", {"merged": merged.manifest.digest}), {"merged": merged}) == []
    (problem,) = parent_problems(manifest("quantized", {"merged": "0" * 64}), {"merged": merged})
    assert problem.startswith("made of the merged 000000000000")
    assert problem.endswith("stale, or of another run")


def test_facts_that_are_not_the_bases_are_named() -> None:
    changed = FACTS.model_copy(update={"stop_ids": (5,), "context_tokens": 32, "base_digest": "z" * 64})
    found = fact_problems(changed, FACTS, "w" * 64)
    assert found == [
        "context_tokens is 32, the base has 64",
        "stop_ids is (5,), the base has (2,)",
        "made for the base zzzzzzzzzzzz, this run has wwwwwwwwwwww: another base model",
    ]


def test_configuration_keys_that_decide_the_model_must_be_the_bases() -> None:
    base = {"rope_parameters": {"rope_type": "yarn"}, "tie_word_embeddings": True, "dtype": "bfloat16"}
    assert config_problems({**base, "dtype": "float32", "transformers_version": "5"}, base) == []
    lost = config_problems({"rope_parameters": None, "tie_word_embeddings": False}, base)
    assert lost == [
        "config.json: rope_parameters is None, the base has {'rope_type': 'yarn'}",
        "config.json: tie_word_embeddings is False, the base has True",
    ]


@pytest.mark.parametrize(("eos", "num_problems"), [(2, 0), ([2], 0), ([2, 3], 1), (None, 1)])
def test_stop_ids_of_folder_and_manifest_must_be_the_same(tmp_path: Path, eos: Any, num_problems: int) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    assert len(stop_problems(tmp_path, {"eos_token_id": 9}, (2,))) == num_problems


def test_adapter_with_another_alpha_than_the_specs_is_named(tmp_path: Path) -> None:
    facts = AdapterFacts(rank=4, alpha=8, target_modules=("q_proj", "k_proj"))
    adapter = Artifact(tmp_path, manifest("adapter", {}, FACTS.model_copy(update={"adapter": facts})))
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 8}))
    assert adapter_problems(adapter, facts.model_copy(update={"target_modules": ("k_proj", "q_proj")})) == []
    assert adapter_problems(adapter, facts.model_copy(update={"alpha": 16})) == ["alpha is 8.0 in its manifest, the spec says 16"]
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 32}))
    (problem,) = adapter_problems(adapter, facts)
    assert problem == "adapter_config.json: lora_alpha is 32, its manifest says 8.0: wrong alpha, rank or scaling"


def test_held_out_row_among_the_training_rows_is_a_leak(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": str(number)}]} for number in range(4)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:3]))
    (tmp_path / "heldout.jsonl").write_text("".join(json.dumps({**row, "slice": "s"}) + "\n" for row in rows[2:]))
    check = check_leaks(tmp_path, None)
    assert (check.passed, check.cause) == (False, "held-out row 0 is training row 2")
    assert check_leaks(tmp_path, limit_rows=2).passed


# What is asked, and how a client asks it


def test_asks_force_each_answer_once() -> None:
    own = Scored(name="x", prompt_ids=(1,))
    both = case(expected_ids=(10, STOP), greedy_ids=(10,), has_ended=True)
    assert [ask.source for ask in asks(both, own, STOP)] == ["expected"]
    other = both.model_copy(update={"has_ended": False})
    assert asks(other, own, STOP) == [
        Ask(name="x", source="expected", prompt_ids=(1,), answer_ids=(10, STOP)),
        Ask(name="x", source="greedy", prompt_ids=(1,), answer_ids=(10,)),
    ]
    assert asks(both, Scored(name="x", refusal="no"), STOP) == []


def test_client_sends_arguments_of_a_call_as_text() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"a": "ü"}}}
    sent = client_message({"role": "assistant", "content": "", "tool_calls": [call]})
    assert sent["tool_calls"][0]["function"] == {"name": "f", "arguments": '{"a": "ü"}'}
    assert client_message({"role": "user", "content": "x"}) == {"role": "user", "content": "x"}


# The whole


def certificate(*checks: Check) -> dict[str, Any]:
    same = {"value": 1.0, "low": 0.9, "high": 1.0, "n": 4}
    return {
        "reference": "adapter", "models": {"merged": {"same_answer": same}}, "checks": [check.model_dump() for check in checks],
        "candidates": ["int8", "int4"], "chats": {"heldout": 1, "adversarial": 2},
    }  # fmt: skip


def line(name: str, stage: str, passed: bool = True) -> Check:
    return Check(name=name, stage=stage, passed=passed, compared="this with that", found="0.5", cause="" if passed else "a broken thing")


def test_gates_of_one_candidate_leave_the_others_out() -> None:
    checks = [line("lineage", "merged"), line("answers", "int8"), line("answers", "int8 live"), line("answers", "int4 live", False)]
    checks.append(line("lineage", "int4", False))
    gates = {gate["name"]: gate["passed"] for gate in certificate_gates(certificate(*checks), "int8")}
    assert gates == {"certificate: lineage": True, "certificate: answers": True}
    refused = {gate["name"]: gate for gate in certificate_gates(certificate(*checks), "int4")}
    assert not refused["certificate: answers"]["passed"]
    assert refused["certificate: lineage"]["detail"] == "int4: 0.5; a broken thing"


def test_certificate_that_says_nothing_of_the_candidate_refuses_it() -> None:
    for told in ({}, certificate(), certificate(line("lineage", "merged")), certificate(line("lineage", "int4"))):
        assert [gate["passed"] for gate in certificate_gates(told, "int8")] == [False]


def test_explanation_tells_every_check_and_what_a_failure_would_mean() -> None:
    text = explain(certificate(*(line(name, "int8", name != "merge") for name in MEANINGS)), "good, by this machine's key").plain
    assert f"REFUSED: {len(MEANINGS) - 1} of {len(MEANINGS)} checks passed, over 1 held-out rows and 2 other chats" in text
    assert all(meaning in text for meaning in MEANINGS.values())
    assert "FAIL  int8: this with that: 0.5\n        a broken thing" in text
    assert "signature good" in text
