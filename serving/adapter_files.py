"""What an engine's process knows of LoRA adapters; light, for that process checks nothing that its parent has checked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ADAPTER_FILE_NAME = "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."
"""In front of a module's name in an adapter's file."""


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """What an engine must know of one adapter."""

    folder: str
    rank: int
    scale: float
    """Factor of B A."""

    @property
    def weights(self) -> Path:
        """Its safetensors."""
        return Path(self.folder) / ADAPTER_FILE_NAME

    @property
    def modules(self) -> set[str]:
        """Names of the layers that it changes, from the header of its file: JSON after its length in 8 bytes."""
        with self.weights.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        return {name.removeprefix(PEFT_PREFIX).rpartition(".lora_")[0] for name in header if name != "__metadata__"}


def read_adapters(told: Mapping[str, Any] | None) -> dict[str, AdapterFiles]:
    """The adapters, as an engine's process gets them from `serving.adapters.adapter_settings`."""
    return {name: AdapterFiles(**files) for name, files in (told or {}).items()}
