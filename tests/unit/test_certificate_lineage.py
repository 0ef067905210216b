"""Whether the folders of a run belong together, and whether what was held out was trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from infra.contracts import AdapterFacts, Kind, Manifest, ModelFacts, read_manifest
from infra.provenance import Provenance
from pipelines.proof.certificate import lineage_checks
from pipelines.proof.leaks import check_leaks
from pipelines.proof.lineage import adapter_problems, config_problems, fact_problems, parent_problems, stop_problems
from pipelines.step import Artifact

FACTS = ModelFacts(
    base_model="b", base_digest="w" * 64, tokenizer_digest="t" * 64, chat_template_digest="c" * 64, special_tokens={"eos_token": "</s>"},
    context_tokens=64, stop_ids=(2,),
)  # fmt: skip


def manifest(kind: Any, parents: dict[str, str], facts: ModelFacts = FACTS) -> Manifest:
    return Manifest(kind=kind, files={}, model=facts, parents=parents, provenance=Provenance())


def run_of(base_dir: Path, adapter: AdapterFacts | None) -> dict[str, Artifact]:
    """What the steps before `prove` leave, by manifests alone; without an adapter, of full fine-tuning."""
    own = read_manifest(base_dir)
    assert own.model is not None
    trained_facts = own.model.model_copy(update={"base_digest": own.digest, "adapter": adapter})
    merged_facts = trained_facts.model_copy(update={"adapter": None})
    found = {"base": Artifact(base_dir, own)}

    def add(name: str, kind: Kind, parents: dict[str, str], facts: ModelFacts | None = None) -> None:
        digests = {role: found[parent].manifest.digest for role, parent in parents.items()}
        found[name] = Artifact(base_dir, Manifest(kind=kind, files={}, model=facts, parents=digests, provenance=Provenance()))

    sources = {"base": "base", "tokens": "render"}
    add("rows", "dataset", {})
    add("render", "tokens", {"base": "base", "dataset": "rows"})
    add("predict-base", "answers", {"model": "base", "tokens": "render"})
    if adapter:
        add("train", "adapter", sources, trained_facts)
        add("merge", "merged", {"base": "base", "adapter": "train"}, merged_facts)
        add("predict-adapter", "answers", {"model": "base", "adapter": "train", "tokens": "render"})
    else:
        add("train", "merged", sources, merged_facts)
    add("predict-merged", "answers", {"model": "merge" if adapter else "train", "tokens": "render"})
    return found


LORA = AdapterFacts(rank=4, alpha=8, target_modules=("q_proj",))


@pytest.mark.parametrize("adapter", [None, LORA])
def test_folders_of_one_run_belong_together(toy_base: Path, adapter: AdapterFacts | None) -> None:
    checks = lineage_checks(run_of(toy_base, adapter), [], adapter)
    assert [check.cause for check in checks if not check.passed] == []
    assert [check.stage for check in checks] == ["base", "tokens", *(["adapter"] if adapter else []), "merged"]


@pytest.mark.parametrize(
    ("adapter", "stage", "role"),
    [
        (None, "base", "model"),
        (None, "merged", "model"),
        (None, "merged", "tokens"),
        (LORA, "adapter", "adapter"),
        (LORA, "merged", "model"),
    ],
)
def test_answers_of_another_model_or_to_other_prompts_are_named(
    toy_base: Path, adapter: AdapterFacts | None, stage: str, role: str
) -> None:
    inputs = run_of(toy_base, adapter)
    name = f"predict-{stage}"
    told = inputs[name].manifest
    stale = told.model_copy(update={"parents": {**told.parents, role: "0" * 64}})
    checks = lineage_checks({**inputs, name: Artifact(toy_base, stale)}, [], adapter)
    (refused,) = [check for check in checks if not check.passed]
    assert refused.stage == stage
    assert refused.cause.startswith(f"its answers were made of the {role} 000000000000, this run has ")


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
