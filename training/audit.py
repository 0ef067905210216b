"""Whether the merge and the rendering are what they should be, computed a second time in another way.

- Merged weights are `round(W + scale B A)`; what does not fit is described by the factor on B A that would fit it best.
- A rendered row is the template's own text, its labels begin where the prompt ends, and each answer ends in a label on a stop token.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from infra.chat import ChatCodec
from infra.contracts import AdapterFacts
from infra.errors import ConfigError
from training.adapter import ADAPTER_NAME, PEFT_PREFIX
from training.data.tokens import TokenRow, read_token_rows
from training.weights import TensorSpec, tensor_specs, weight_files

SAME_SHARE = 0.999  # of a tensor's numbers; the order of sums in fp32 moves a few roundings
MAX_NOTED = 8


def audit_merge(base_dir: Path, adapter_dir: Path, merged_dir: Path, facts: AdapterFacts, max_bytes: float, seed: int) -> dict[str, Any]:
    """How many tensors were merged again, and what is wrong with those that differ."""
    base, merged = _where(base_dir), _where(merged_dir)
    problems = _other_tensors(base, merged)
    names = _sample(base, max_bytes, seed)
    with safe_open(adapter_dir / ADAPTER_NAME, framework="pt") as adapter:
        for name in names:
            if name in merged and merged[name][1] == base[name][1]:
                weight, found = (_read(where[name]) for where in (base, merged))
                if note := _difference(weight, found, _parts(adapter, name, facts.use_dora), facts.scale):
                    problems.append(f"{name}: {note}")
    return {"tensors": len(names), "of": len(base), "problems": problems[:MAX_NOTED], "num_problems": len(problems)}


def _where(folder: Path) -> dict[str, tuple[Path, TensorSpec]]:
    return {spec.name: (folder / name, spec) for name in weight_files(folder) for spec in tensor_specs(folder / name)}


def _other_tensors(base: Mapping[str, tuple[Path, TensorSpec]], merged: Mapping[str, tuple[Path, TensorSpec]]) -> list[str]:
    """Names, shapes and dtypes that a merge never changes."""
    problems = [f"{name}: in the base and not in the merged model" for name in base if name not in merged]
    for name in merged:
        if name not in base:
            tied = ", so embeddings that were tied are no longer" if name == "lm_head.weight" else ""
            problems.append(f"{name}: in the merged model and not in the base{tied}")
    changed = [name for name in base if name in merged and base[name][1] != merged[name][1]]
    return problems + [f"{name}: {_told(base[name][1])} in the base and {_told(merged[name][1])} in the merged model" for name in changed]


def _told(spec: TensorSpec) -> str:
    return f"{spec.dtype} {list(spec.shape)}"


def _sample(base: Mapping[str, tuple[Path, TensorSpec]], max_bytes: float, seed: int) -> list[str]:
    """All tensors, or a seeded part of them that is no larger than `max_bytes` and has one at least."""
    names = sorted(base)
    random.Random(seed).shuffle(names)
    chosen: list[str] = []
    size = 0
    for name in names:
        size += base[name][1].num_bytes
        if chosen and size > max_bytes:
            break
        chosen.append(name)
    return sorted(chosen)


def _read(where: tuple[Path, TensorSpec]) -> Tensor:
    with safe_open(where[0], framework="pt") as weights:
        found: Tensor = weights.get_tensor(where[1].name)
    return found


def _parts(adapter: Any, name: str, use_dora: bool) -> list[Tensor]:
    """A (rank, in), B (out, rank) and perhaps norms (out) for one weight; nothing where the adapter leaves it."""
    stem = f"{PEFT_PREFIX}{name.removesuffix('.weight')}.lora_"
    if f"{stem}A.weight" not in adapter.keys():  # noqa: SIM118 - not a mapping
        return []
    wanted = ["A.weight", "B.weight", *(["magnitude_vector"] if use_dora else [])]
    return [adapter.get_tensor(stem + part).float() for part in wanted]


def _difference(weight: Tensor, found: Tensor, parts: Sequence[Tensor], scale: float) -> str:
    """What is wrong with one merged tensor; empty where nothing is."""
    if not parts:
        return "" if torch.equal(weight, found) else "the adapter does not change it, and it differs from the base's"
    a, b, *norms = parts
    update = scale * torch.matmul(b, a)
    expected = weight.float() + update
    if norms:
        expected = expected / torch.linalg.vector_norm(expected, dim=1, keepdim=True) * norms[0][:, None]
    same = float((expected.to(weight.dtype) == found).float().mean())
    if same >= SAME_SHARE:
        return ""
    gap = (found.float() - expected).abs().max().item()
    change = found.float() - weight.float()
    factor = float((change * update).sum() / update.square().sum().clamp(min=1e-30))
    left = float((change - factor * update).norm() / update.norm().clamp(min=1e-30))
    return f"{_cause(factor, left, scale)} ({1 - same:.1%} of its numbers differ, by up to {gap:.2g})"


def _cause(factor: float, left: float, scale: float) -> str:
    """In words: `factor` of the update is there, and what else was changed is `left` times as large as the update."""
    if abs(factor) < 0.05 and left < 0.5:
        return "the adapter's update is not in it: this layer was skipped, or the adapter was not loaded"
    if left < 0.5 and abs(factor - 1) > 0.02:
        return f"the adapter's update is in it {factor:.2f} times, scale {factor * scale:.3g} instead of {scale:.3g}: wrong alpha or rank"
    return "more than the adapter's update was changed: merged into other weights than the base's 16-bit ones, such as quantized ones"


def audit_rendering(
    tokens_dir: Path, rows_dir: Path, codec: ChatCodec, stop_ids: Sequence[int], num_rows: int, seed: int
) -> dict[str, Any]:
    """How many training rows were rendered again, and what is wrong with those that differ."""
    rows = read_token_rows(tokens_dir, "train")
    chosen = sorted(random.Random(seed).sample(range(len(rows)), min(num_rows, len(rows))))
    tokens = {row.row: row for row in (rows[index] for index in chosen)}
    problems = []
    with (rows_dir / "train.jsonl").open(encoding="utf-8") as stream:
        for number, line in enumerate(stream):
            if number in tokens and (note := _row_problem(codec, json.loads(line), tokens[number], stop_ids)):
                problems.append(f"train row {number}: {note}")
    return {"rows": len(tokens), "of": len(rows), "problems": problems[:MAX_NOTED], "num_problems": len(problems)}


def _row_problem(codec: ChatCodec, row: Mapping[str, Any], tokens: TokenRow, stop_ids: Sequence[int]) -> str:
    """What is wrong with one rendered row; empty where nothing is."""
    if "text" in row:
        return "" if tokens.supervised[-1] and tokens.ids[-1] in stop_ids else "its end has no label, so a stop token is never learnt"
    ids = tuple(codec.encode(row["messages"], row.get("tools")))
    if ids != tokens.ids:
        place = first_difference(ids, tokens.ids)
        return f"its token ids differ from the template's own from position {place} on: another template, tokenizer, BOS or other row"
    runs = _runs(tokens.supervised)
    turns = [turn for turn, message in enumerate(row["messages"]) if message["role"] == "assistant"]
    if len(runs) != len(turns):
        return f"it has {len(turns)} answers and {len(runs)} runs of labels"
    for (start, end), turn in zip(runs, turns, strict=True):
        try:
            wanted = len(codec.encode(row["messages"][:turn], row.get("tools"), add_generation_prompt=True))
        except ConfigError:
            continue
        if start != wanted:
            return f"labels begin at token {start} and the answer at {wanted}: {_misplaced(start, wanted)}"
        if tokens.ids[end - 1] not in stop_ids:
            return "the stop token after an answer has no label, so the model never learns to stop"
    return ""


def _misplaced(start: int, wanted: int) -> str:
    return "tokens of the prompt are learnt" if start < wanted else "the beginning of the answer is not learnt"


def _runs(supervised: Sequence[bool]) -> list[tuple[int, int]]:
    """First and one past the last place of each run of labels."""
    places = ((mark, [place for place, _ in group]) for mark, group in groupby(enumerate(supervised), key=lambda item: item[1]))
    return [(run[0], run[-1] + 1) for mark, run in places if mark]


def first_difference(one: Sequence[int], other: Sequence[int]) -> int:
    """The first place at which two sequences differ, or the length of the shorter."""
    return next((place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
