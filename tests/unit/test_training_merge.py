"""Merging gives W + scale B A, rounded once, on the right base and nothing else."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from infra.answers import read_answers, read_prompts
from infra.chat import load_codec
from infra.contracts import AdapterFacts, Manifest, ModelFacts, read_manifest, verify, write_manifest
from infra.errors import ArtifactError
from infra.provenance import Provenance
from infra.settings import child_environment
from training import generate
from training.adapter import ADAPTER_NAME
from training.base import prepare_base
from training.config import BaseJob, MergeJob, PredictJob
from training.merge import merge
from training.model import load_base
from training.predict import predict

FACTS = AdapterFacts(rank=4, alpha=8, target_modules=("q_proj", "down_proj"))
REPOSITORY = Path(__file__).resolve().parents[2]
Q0 = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def adapter(toy_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random adapter on two kinds of layer."""
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(5)
    tensors = {}
    for layer in range(2):
        for name, rows, columns in (("self_attn.q_proj", 64, 64), ("mlp.down_proj", 64, 128)):
            stem = f"base_model.model.model.layers.{layer}.{name}"
            tensors |= {f"{stem}.lora_A.weight": torch.randn(4, columns) * 0.2, f"{stem}.lora_B.weight": torch.randn(rows, 4) * 0.2}
    save_file(tensors, folder / ADAPTER_NAME)
    seal(folder, toy_base, FACTS)
    return folder


def seal(folder: Path, base_dir: Path, facts: AdapterFacts | None, base_digest: str = "") -> Manifest:
    base = read_manifest(base_dir)
    assert base.model is not None
    model: ModelFacts = base.model.model_copy(update={"base_digest": base_digest or base.digest, "adapter": facts})
    return write_manifest(folder, "adapter", Provenance(), model=model)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_merge_adds_scaled_product_and_rounds_once(toy_base: Path, adapter: Path, tmp_path: Path, use_rslora: bool) -> None:
    own = tmp_path / "adapter"
    shutil.copytree(adapter, own)
    seal(own, toy_base, FACTS.model_copy(update={"use_rslora": use_rslora}))
    merge(MergeJob(output_dir=tmp_path / "merged", base_dir=toy_base, adapter_dir=own))
    before, after, parts = (load_file(path) for path in (
        toy_base / "model.safetensors", tmp_path / "merged/model.safetensors", own / ADAPTER_NAME,
    ))  # fmt: skip
    scale = 8 / math.sqrt(4) if use_rslora else 8 / 4
    a, b = (parts[f"base_model.model.{Q0}.lora_{side}.weight"].double() for side in "AB")
    expected = before[f"{Q0}.weight"].double() + scale * b @ a
    error = (after[f"{Q0}.weight"].double() - expected).abs()
    assert bool((error <= expected.abs() * 2**-8 + 1e-6).all())  # half a step of bf16, and fp32's own rounding
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"model.layers.{layer}.{name}.weight" for layer in range(2) for name in ("self_attn.q_proj", "mlp.down_proj")}
    assert set(after) == set(before)
    assert all(after[name].dtype == before[name].dtype for name in before)


def test_merge_manifest_names_parents_and_no_adapter(toy_base: Path, adapter: Path, tmp_path: Path) -> None:
    merge(MergeJob(output_dir=tmp_path / "merged", base_dir=toy_base, adapter_dir=adapter))
    manifest = verify(tmp_path / "merged", ("merged",))
    assert manifest.parents == {"base": read_manifest(toy_base).digest, "adapter": read_manifest(adapter).digest}
    assert manifest.model is not None
    assert manifest.model.adapter is None
    assert load_codec(tmp_path / "merged").template_digest == manifest.model.chat_template_digest


def test_merge_shards_stay_as_they_are(toy_model: Path, toy_base: Path, adapter: Path, tmp_path: Path) -> None:
    source, tensors = tmp_path / "sharded", load_file(toy_model / "model.safetensors")
    shutil.copytree(toy_model, source)
    (source / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[:9], "model-00002-of-00002.safetensors": names[9:]}
    for name, held in shards.items():
        save_file({key: tensors[key] for key in held}, source / name, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {key: name for name, held in shards.items() for key in held}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    prepare_base(BaseJob(output_dir=tmp_path / "base", source=f"file:{source}"))
    own = tmp_path / "adapter"
    shutil.copytree(adapter, own)
    seal(own, tmp_path / "base", FACTS)
    merge(MergeJob(output_dir=tmp_path / "sharded_out", base_dir=tmp_path / "base", adapter_dir=own))
    merge(MergeJob(output_dir=tmp_path / "single_out", base_dir=toy_base, adapter_dir=adapter))
    whole = load_file(tmp_path / "single_out/model.safetensors")
    for name, held in shards.items():
        part = load_file(tmp_path / "sharded_out" / name)
        assert sorted(part) == held
        assert all(torch.equal(part[key], whole[key]) for key in held)


def test_merge_on_another_base_is_refused(toy_base: Path, adapter: Path, tmp_path: Path) -> None:
    own = tmp_path / "adapter"
    shutil.copytree(adapter, own)
    seal(own, toy_base, FACTS, base_digest="0" * 64)
    with pytest.raises(ArtifactError, match="0000"):
        merge(MergeJob(output_dir=tmp_path / "merged", base_dir=toy_base, adapter_dir=own))


def test_merge_adapter_that_would_change_nothing_is_refused(toy_base: Path, adapter: Path, tmp_path: Path) -> None:
    tensors = load_file(adapter / ADAPTER_NAME)
    a = f"base_model.model.{Q0}.lora_A.weight"
    spoilt = {
        "renamed": {key.replace("model.layers", "layers"): value for key, value in tensors.items()},
        "half": {key: value for key, value in tensors.items() if key != a},
        "empty": {},
        "shape": {**tensors, a: tensors[a][:, :32].contiguous()},
    }
    for name, held in spoilt.items():
        own = tmp_path / name
        own.mkdir()
        save_file(held, own / ADAPTER_NAME)
        seal(own, toy_base, FACTS)
        with pytest.raises(ArtifactError):
            merge(MergeJob(output_dir=tmp_path / "merged", base_dir=toy_base, adapter_dir=own))
        assert not (tmp_path / "merged/manifest.json").exists()


def test_generate_equals_transformers_greedy_row_by_row(toy_base: Path, toy_tokens: Path) -> None:
    prompts = read_prompts(toy_tokens)
    model = load_base(toy_base, torch.float32, generate.NAME)
    endless = generate.greedy_answers(model, [prompt.ids for prompt in prompts], (), 24)
    stop_ids = sorted({endless[0][0][3], endless[4][0][8], endless[7][0][15]})
    found = generate.greedy_answers(model, [prompt.ids for prompt in prompts], stop_ids, 24)
    reference = load_base(toy_base, torch.float32, "sdpa")
    for prompt, (ids, ended) in zip(prompts, found, strict=True):
        made = reference.generate(
            torch.tensor([prompt.ids]), attention_mask=torch.ones(1, len(prompt.ids)), max_new_tokens=24, do_sample=False,
            eos_token_id=stop_ids, pad_token_id=2,
        )[0, len(prompt.ids) :].tolist()  # fmt: skip
        assert ended == (made[-1] in stop_ids)
        assert ids == (made[:-1] if ended else made)
    assert len({len(ids) for ids, _ in found}) > 1  # some rows left the batch before others


def test_generate_one_prompt_and_prompts_with_nothing_in_common(toy_base: Path) -> None:
    model = load_base(toy_base, torch.float32, generate.NAME)
    prompts = [(5, 9, 30), (60, 61, 62, 63, 64, 65), (70,)]
    together = generate.greedy_answers(model, prompts, (), 5)
    assert together == [generate.greedy_answers(model, [prompt], (), 5)[0] for prompt in prompts]


def test_predict_adapter_and_merged_give_the_same_answers_and_the_base_others(
    toy_base: Path, toy_tokens: Path, adapter: Path, tmp_path: Path
) -> None:
    merge(MergeJob(output_dir=tmp_path / "merged", base_dir=toy_base, adapter_dir=adapter))
    shared = {"tokens_dir": toy_tokens, "max_new_tokens": 6, "batch_rows": 4}
    predict(PredictJob(output_dir=tmp_path / "a", model_dir=toy_base, adapter_dir=adapter, **shared))
    predict(PredictJob(output_dir=tmp_path / "m", model_dir=tmp_path / "merged", **shared))
    predict(PredictJob(output_dir=tmp_path / "b", model_dir=toy_base, limit_rows=7, **shared))
    by_adapter, by_merged, by_base = (read_answers(tmp_path / name) for name in "amb")
    rows = [prompt.row for prompt in read_prompts(toy_tokens)]
    assert [answer.row for answer in by_adapter] == [answer.row for answer in by_merged] == rows
    assert [answer.row for answer in by_base] == rows[:7]
    same = sum(one.ids[:1] == other.ids[:1] for one, other in zip(by_adapter, by_merged, strict=True))
    assert same >= 9  # random weights leave near ties; a first token may flip in bf16
    assert [answer.ids for answer in by_base] != [answer.ids for answer in by_adapter[:7]]
    assert verify(tmp_path / "a", ("answers",)).parents["adapter"] == read_manifest(adapter).digest


def test_predict_adapter_of_another_base_is_refused(toy_base: Path, toy_tokens: Path, adapter: Path, tmp_path: Path) -> None:
    own = tmp_path / "adapter"
    shutil.copytree(adapter, own)
    seal(own, toy_base, FACTS, base_digest="0" * 64)
    with pytest.raises(ArtifactError, match="not an adapter of the model"):
        predict(PredictJob(output_dir=tmp_path / "a", model_dir=toy_base, adapter_dir=own, tokens_dir=toy_tokens))


MERGE_AND_MEASURE = """
import re, sys, threading
from pathlib import Path
import torch
from training.config import MergeJob
from training.merge import merge

def own_bytes():  # not ru_maxrss: a process inherits that from the one that starts it, and ours holds more than a merge
    return 1024 * int(re.search(r"RssAnon:\\s*([0-9]+)", Path("/proc/self/status").read_text())[1])

peak, is_over = 0, threading.Event()

def watch():
    global peak
    while not is_over.wait(0.0005):
        peak = max(peak, own_bytes())

torch.zeros(10).sum()
before = own_bytes()
thread = threading.Thread(target=watch)
thread.start()
merge(MergeJob.model_validate_json(sys.argv[1]))
is_over.set()
thread.join()
print(peak - before)
"""


def test_merge_needs_a_few_times_its_largest_tensor_whatever_the_model(toy_model: Path, tmp_path: Path) -> None:
    """Two shards of 24 tensors of 2.6 MB: 55 MB are measured, for one tensor in fp32, gaps of the heap and the threads' buffers. A shard
    held whole makes it 139 MB, the model 168.
    """
    source, adapter_dir = tmp_path / "source", tmp_path / "adapter"
    shutil.copytree(toy_model, source)
    (source / "model.safetensors").unlink()
    adapter_dir.mkdir()
    weight_map, adapter = {}, {}
    for shard in range(2):
        name = f"model-0000{shard + 1}-of-00002.safetensors"
        names = [f"model.layers.{8 * shard + layer}.mlp.{part}_proj.weight" for layer in range(8) for part in ("up", "gate", "down")]
        tensors = {key: torch.randn(1280, 1024).to(torch.bfloat16) for key in names}
        save_file(tensors, source / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        for key in tensors:
            stem = f"base_model.model.{key.removesuffix('.weight')}"
            adapter |= {f"{stem}.lora_A.weight": torch.randn(16, 1024), f"{stem}.lora_B.weight": torch.randn(1280, 16)}
    (source / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    prepare_base(BaseJob(output_dir=tmp_path / "base", source=f"file:{source}"))
    save_file(adapter, adapter_dir / ADAPTER_NAME)
    seal(adapter_dir, tmp_path / "base", FACTS)
    job = MergeJob(output_dir=tmp_path / "merged", base_dir=tmp_path / "base", adapter_dir=adapter_dir)
    command = [sys.executable, "-c", MERGE_AND_MEASURE, job.model_dump_json()]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=REPOSITORY, env=child_environment())
    tensor_bytes = 1280 * 1024 * 2
    assert 2 * tensor_bytes < int(done.stdout) < 30 * tensor_bytes  # less than two: the thread that watches did not see them
