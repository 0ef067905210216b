"""Parts of the held-out rows that are scored by themselves: those that rows name, and those that show in the rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import quantiles
from typing import Literal, get_args

from infra.answers import Prompt
from infra.evaluation.tool_calls import first_name

SliceBy = Literal["tool", "length", "language"]
SLICES_BY: tuple[SliceBy, ...] = get_args(SliceBy)


def slice_rows(prompts: Sequence[Prompt], by: Sequence[SliceBy] = SLICES_BY) -> dict[str, list[int]]:
    """Places of the rows in each slice, by its name: the row's own, then `tool=HassTurnOn`, `length=short`, `language=de`.

    A kind of slice that holds all rows in one is left out, for it says nothing.
    """
    found: dict[str, list[int]] = {}
    for place, prompt in enumerate(prompts):
        if prompt.slice:
            found.setdefault(prompt.slice, []).append(place)
    namers: dict[SliceBy, Callable[[Prompt], str]] = {"tool": _tool, "length": _length_namer(prompts), "language": _language}
    for kind in by:
        parts: dict[str, list[int]] = {}
        for place, prompt in enumerate(prompts):
            if name := namers[kind](prompt):
                parts.setdefault(f"{kind}={name}", []).append(place)
        if any(len(places) < len(prompts) for places in parts.values()):
            found |= dict(sorted(parts.items()))
    return found


def _tool(prompt: Prompt) -> str:
    return first_name(prompt.expected) or ""


def _language(prompt: Prompt) -> str:
    return prompt.language


def _length_namer(prompts: Sequence[Prompt]) -> Callable[[Prompt], str]:
    """By terciles of the prompts' tokens; prompts of one length are always in the same part."""
    lengths = [len(prompt.ids) for prompt in prompts]
    if len(lengths) < 2:
        return lambda prompt: ""
    short, medium = quantiles(lengths, n=3, method="inclusive")

    def name(prompt: Prompt) -> str:
        length = len(prompt.ids)
        return "short" if length <= short else "medium" if length <= medium else "long"

    return name
