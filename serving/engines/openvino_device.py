"""What OpenVINO's processor plugin is told about a model, by the pipeline that serves it and by the one that its certificate looks into."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from infra.files import MANIFEST_NAME, read_json
from infra.model_sizes import dividing, row_sizes

# Each number of tokens that a step can have gets kernels of its own, about 1 MB, which the plugin keeps (5000 by itself) and oneDNN in it
# (infra/settings.py says how many). With 32 of each, the 135M model's process held 666 MB where it was 914 after 1,300 requests
# of many lengths, and made 1.01, 1.00 and 0.98 times the tokens/s at 8, 32 and 64 requests of lengths that differ. With 16 it held 11 MB
# less than with 32 at 0.98 to 1.02 times the tokens/s; with 8 another 8 MB less, at 0.94 to 0.98.
KERNELS_KEPT = "16"
ACTIVATION_GROUP_SIZES = (128, 96, 64)
"""Numbers of an activation that may share a scale, largest first; the plugin's own are 32, which divide what it can read at all."""


def device_properties(model_dir: Path, num_threads: int | None, precision: str) -> dict[str, Any]:
    """The library's own settings of the processor for the model in a folder.

    Its cache of compiled models (CACHE_DIR) is left off: OpenVINO 2026.4.1 stores no head sizes of paged attention, refuses its own copy
    for want of them (intel_cpu/src/nodes/paged_attn.cpp), compiles anew and writes the copy again. Loading the 135M model took 2.7 to
    3.0 s with it and 2.4 without (medians of six, in turns); the same model without paged attention took 0.23 s from its copy.
    """
    properties: dict[str, Any] = {"CPU_RUNTIME_CACHE_CAPACITY": KERNELS_KEPT}
    if num_threads:
        properties["INFERENCE_NUM_THREADS"] = num_threads
    if precision != "auto":
        properties["INFERENCE_PRECISION_HINT"] = precision
    if size := activation_group_size({*row_sizes(read_json(model_dir / "config.json")), *_weight_groups(model_dir)}):
        properties["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = str(size)
    return properties


def activation_group_size(sizes: Collection[int]) -> int | None:
    """Numbers of an activation that share a scale where it is multiplied with 8-bit or 4-bit weights, to fit rows and groups of these
    sizes; None leaves the plugin's own.

    Each group costs an addition in 32 bits, and one that lies across the end of a row or of a group of weights more than it saves: groups
    of 128 made 0.74 times the tokens/s of 32 with INT4 in groups of 64. The 135M model gets 96, its INT4 those 64; on AMX the first makes
    1.05, 1.07, 1.13, 1.11 and 1.18 times the tokens/s at 1, 4, 16, 32 and 64 requests, the second 1.02 and 1.10 at 1 and 32. It costs a
    mean KL divergence of 0.005 from activations that are not rounded, where 32 have 0.0016 (INT4: 0.003, 0.0014), and none of the 300
    smart-home rows: 294 and 291 right, as before. 192 is no faster and has 0.008, a whole row 0.019.
    """
    return next(iter(dividing(ACTIVATION_GROUP_SIZES, sizes)), None) if sizes else None


def _weight_groups(model_dir: Path) -> list[int]:
    """The numbers of a weight row that share a scale, where not the whole row does."""
    path = model_dir / MANIFEST_NAME
    told = read_json(path) if path.is_file() else {}
    size = ((told.get("model") or {}).get("weights") or {}).get("group_size")
    return [size] if size else []
