"""`python -m serving.capacity.table FILE...`: writes the table of capacities into READMEs, between two marks.

What it tells is what `slipway plan` tells of the curves that come along, for loads that a reader may compare with their own.
"""

from __future__ import annotations

import sys
from pathlib import Path

from infra.files import write_text_atomic
from infra.marked_text import placed
from serving.capacity.curves import read_measured
from serving.capacity.demand import Demand
from serving.capacity.sizing import Plan, plan

BEGINS, ENDS = "<!-- capacity: written by python -m serving.capacity.table -->\n", "<!-- end of capacity -->"
LOADS = (100, 500, 1000, 2000, 5000, 20_000)
CURVES = ("openvino-int8-135m", "vllm-h100-gpt-oss-20b")
TTFT_S = 1.0
HEAD = ("new tokens/s", "replica", "replicas needed", "nodes", "USD/h", "USD/M tokens", "first token, 99%", "ms/token")


def table(loads: tuple[int, ...] = LOADS) -> str:
    """The rows in Markdown, one for each load and curve."""
    measured = read_measured()
    lines = ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    for tokens_per_s in loads:
        demand = Demand(tokens_per_s=tokens_per_s, ttft_s=TTFT_S)
        for name in CURVES:
            curve = measured.curves[name]
            lines.append(_row(tokens_per_s, plan(name, curve, curve.node, measured.nodes[curve.node], demand)))
    return "\n".join(lines) + "\n"


def _row(tokens_per_s: int, each: Plan) -> str:
    if each.kept is None:
        return f"| {tokens_per_s} | {each.curve} | {each.reason} |" + " |" * (len(HEAD) - 3)
    price = ("-", "-") if each.usd_per_hour is None else (f"{each.usd_per_hour:.2f}", f"{each.usd_per_million_tokens:.3f}")
    cells = (
        f"{tokens_per_s}",
        each.curve,
        f"{each.kept.num_replicas}",
        f"{each.num_nodes} {each.node}",
        *price,
        f"{each.kept.ttft_share_s:.2f} s",
        f"{1e3 * each.kept.itl_p50_s:.0f}",
    )
    return "| " + " | ".join(cells) + " |"


def with_table(text: str, rows: str) -> str:
    """A README with the table in its place. Raises ConfigError where it has none."""
    return placed(text, BEGINS, ENDS, rows, "the table of capacities")


def main(files: list[str]) -> None:
    """Writes the table into each of the files."""
    rows = table()
    for path in map(Path, files):
        write_text_atomic(path, with_table(path.read_text(encoding="utf-8"), rows))


if __name__ == "__main__":
    main(sys.argv[1:])
