"""Inputs of a program that lie outside the home: fields marked `json_schema_extra={"travels": "model" | "dataset" | "files"}`.

Where a program runs on another machine, local ones are sent along, and those of the hub are fetched there. What is marked `"stays"`, such
as an interpreter of the driver's, means nothing there and is left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import BaseModel

from infra import models
from infra.config import Config

REMOTE, STAYS = "hf:", "stays"


class HubSource(Config):
    """Something on the Hugging Face hub."""

    kind: Literal["model", "dataset"]
    source: str
    """`hf:OWNER/NAME[@REVISION]`."""


def travelling(model: BaseModel) -> Iterator[tuple[str, str]]:
    """Value and kind of each marked field that is set, in the model and the models in it."""
    for name, info in type(model).model_fields.items():
        value, extra = getattr(model, name), info.json_schema_extra
        if isinstance(extra, dict) and "travels" in extra and value is not None:
            yield str(value), str(extra["travels"])
        for each in value if isinstance(value, tuple) else (value,):
            if isinstance(each, BaseModel):
                yield from travelling(each)


def hub_sources(model: BaseModel) -> tuple[HubSource, ...]:
    """What a job reads from the hub."""
    found = dict.fromkeys((value, kind) for value, kind in travelling(model) if value.startswith(REMOTE))
    return tuple(HubSource.model_validate({"kind": kind, "source": value}) for value, kind in found)


def fetch_from_hub(sources: tuple[HubSource, ...]) -> None:
    """Puts them into this machine's cache of the hub, where they are not yet. Raises ConfigError where one cannot be had."""
    for each in sources:
        if each.kind == "model":
            models.locate(each.source)
        else:
            models.fetch_dataset(each.source)
