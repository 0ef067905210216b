"""How many replicas and nodes a load needs, and what they cost: by simulation from measured engine curves.

Prints a table, or with `--json` one object. What is left out: Ray's head, the gateways, caches of prompts, and nodes that share one
memory among their replicas, unless the curve was measured on a full one.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from infra.config import parse
from infra.errors import EXIT_DONE, ConfigError, SlipwayError
from serving.capacity.curves import Curve, Node, find_curve, read_measured
from serving.capacity.demand import Demand
from serving.capacity.sizing import Plan, plan

TABLE_CHARS = 100
NODE_FIELDS = ("cpus", "gpus", "reserved_cpus", "usd_per_hour")


def make_plans(
    demand: Demand, named: Sequence[str], node_name: str | None, changed: dict[str, float]
) -> tuple[list[Plan], dict[str, Curve]]:
    """A plan for each curve that is named, or for all that come along, and the curves. Raises ConfigError on an unknown curve or node."""
    measured = read_measured()
    if node_name is not None and node_name not in measured.nodes:
        raise ConfigError(
            f"--node {node_name}: there are {', '.join(measured.nodes)}. Name one of them, and change it by --node-cpus and so on."
        )
    curves = dict(find_curve(name, measured) for name in named) if named else measured.curves
    plans = []
    for name, curve in curves.items():
        kind = node_name or curve.node
        node = parse(Node, {**measured.nodes[kind].model_dump(), **changed}, "--node-...")
        plans.append(plan(name, curve, kind, node, demand))
    return plans, curves


def describe(plans: list[Plan], curves: dict[str, Curve], demand: Demand) -> dict[str, Any]:
    """What `--json` prints."""
    return {
        "demand": demand.model_dump() | {"requests_per_s": round(demand.requests_per_s, 3)},
        "plans": [asdict(each) | {"measured": curves[each.curve].model_dump(mode="json")} for each in plans],
    }


def show(plans: list[Plan], curves: dict[str, Curve], demand: Demand) -> None:
    """The table, on stdout."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("replica", "needed", "nodes", "USD/h", "USD/M tokens", f"TTFT {100 * demand.share:g}%", "ms/token", "busy"):
        table.add_column(name, justify="left" if name in ("replica", "nodes") else "right", no_wrap=True)
    for each in plans:
        if each.kept is not None:
            table.add_row(*_cells(each, demand))
    console = Console()
    console.width = max(console.width, TABLE_CHARS)
    if table.rows:
        console.print(table)
    for each in plans:
        curve = curves[each.curve]
        console.print(f"{each.curve}: {curve.engine}, {curve.model}, {curve.hardware}; {curve.source}", soft_wrap=True, highlight=False)
        if each.reason:
            console.print(f"  no plan: {each.reason}", soft_wrap=True, highlight=False)


def _cells(each: Plan, demand: Demand) -> list[str]:
    assert each.kept is not None, "a plan without replicas is told by its reason"
    prices = ((each.usd_per_hour, 2), (each.usd_per_million_tokens, 3))
    return [
        each.curve,
        f"{each.kept.num_replicas} + {demand.spare}",
        f"{each.num_nodes} {each.node}",
        *("-" if price is None else f"{price:.{digits}f}" for price, digits in prices),
        f"{each.kept.ttft_share_s:.3f} s",
        f"{1e3 * each.kept.itl_p50_s:.1f}",
        f"{each.busy_share:.0%}",
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="slipway plan", description=__doc__)
    fields = Demand.model_fields
    parser.add_argument("--tokens-per-s", type=float, required=True, help=fields["tokens_per_s"].description)
    parser.add_argument("--ttft", dest="ttft_s", type=float, required=True, help=fields["ttft_s"].description)
    for name, kind in (("share", float), ("prompt_tokens", int), ("answer_tokens", int), ("spare", int)):
        default = fields[name].default
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=kind, default=default, help=f"{fields[name].description} ({default})".replace("%", "%%")
        )
    parser.add_argument("--itl", dest="itl_s", type=float, help=fields["itl_s"].description)
    parser.add_argument(
        "--curve", action="append", default=[], help="a measured curve by name, or a file of `slipway bench curve`; may be repeated"
    )
    parser.add_argument("--node", help="kind of node to count in; absent: the curve's")
    for name in NODE_FIELDS:
        parser.add_argument(f"--node-{name.replace('_', '-')}", type=float, help=Node.model_fields[name].description)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    return parser


def main() -> int:
    """The command line; exits 2 where no kind of replica can do what is asked."""
    given = vars(_parser().parse_args())
    changed = {name: value for name in NODE_FIELDS if (value := given[f"node_{name}"]) is not None}
    try:
        demand = parse(Demand, {name: given[name] for name in Demand.model_fields}, "options")
        plans, curves = make_plans(demand, given["curve"], given["node"], changed)
        if given["json"]:
            print(json.dumps(describe(plans, curves, demand)))
        else:
            show(plans, curves, demand)
        if all(each.kept is None for each in plans):
            raise ConfigError("no kind of replica does this: the reasons stand with each. Ask for less, or measure another engine or node.")
    except SlipwayError as error:
        print(f"slipway plan: {error.message}", file=sys.stderr)
        return error.exit_code
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
