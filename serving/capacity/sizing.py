"""How many replicas a demand needs: the least number under which a simulated fleet keeps what was asked."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache

from serving.autoscaling.traces import Request
from serving.capacity.curves import Curve, Node
from serving.capacity.demand import Demand
from serving.capacity.fleet import Fleet
from serving.config import PoolConfig

NUM_REQUESTS = 4000
WARM_SHARE = 0.2  # of the requests, which find a fleet that was idle; they are not counted
MOST_REPLICAS = max(limit.le for limit in PoolConfig.model_fields["num_replicas"].metadata if hasattr(limit, "le"))
MOST_BUSY = 0.95  # of a replica's time; nearer to all of it queues grow for longer than is simulated
GROWTH = 1.15  # from one number tried to the next, until one does
HOURS_PER_MONTH = 730
TOO_MANY = f"more than {MOST_REPLICAS} replicas would be needed, which is the most that one pool may have"


@dataclass(frozen=True)
class Kept:
    """What a fleet of some size keeps; seconds."""

    num_replicas: int
    ttft_p50_s: float
    ttft_share_s: float
    """Within which the share that was asked began."""
    itl_p50_s: float
    is_enough: bool


@dataclass(frozen=True)
class Plan:
    """What one kind of replica needs for a demand; without replicas where no number of them does, and why."""

    curve: str
    node: str
    reason: str | None = None
    kept: Kept | None = None
    num_replicas: int | None = None
    """With the spare ones."""
    num_nodes: int | None = None
    busy_share: float | None = None
    """Of the time of the replicas without the spare ones, at the best rate that was measured."""
    usd_per_hour: float | None = None
    usd_per_month: float | None = None
    usd_per_million_tokens: float | None = None
    """At the demand, all day long."""


def plan(name: str, curve: Curve, node_name: str, node: Node, demand: Demand) -> Plan:
    """The least replicas and nodes of one kind for `demand`, and their price."""
    per_node = node.num_replicas(curve)
    if not per_node:
        needed = f"{curve.cpus_per_replica:g} cores and {curve.gpus_per_replica} GPUs"
        reason = f"a replica needs {needed}; a node has {node.cpus:g} less {node.reserved_cpus:g} and {node.gpus}"
        return Plan(name, node_name, reason)
    kept = smallest(curve, demand)
    if isinstance(kept, str):
        return Plan(name, node_name, kept)
    num_replicas = kept.num_replicas + demand.spare
    num_nodes = math.ceil(num_replicas / per_node)
    found = Plan(name, node_name, None, kept, num_replicas, num_nodes, round(busy_replicas(curve, demand) / kept.num_replicas, 4))
    if node.usd_per_hour is None:
        return found
    usd_per_hour = num_nodes * node.usd_per_hour
    per_million = usd_per_hour / 3600 / demand.tokens_per_s * 1e6
    return replace(
        found,
        usd_per_hour=round(usd_per_hour, 4),
        usd_per_month=round(HOURS_PER_MONTH * usd_per_hour, 2),
        usd_per_million_tokens=round(per_million, 6),
    )


def busy_replicas(curve: Curve, demand: Demand) -> float:
    """The replicas that would be busy all the time with `demand`: each prompt read, each token made at the best rate that was measured."""
    lengths = demand.lengths
    read_s = lengths.mean_prompt / curve.prompt_tokens_per_s + curve.speed.step_s(1)
    return demand.requests_per_s * (read_s + (lengths.mean_answer - 1) / max(curve.tokens_per_s.values()))


def smallest(curve: Curve, demand: Demand) -> Kept | str:
    """What the least number of replicas that is enough keeps, or why there is none."""
    alone_s = curve.speed.step_s(1) + demand.longest_prompt / curve.prompt_tokens_per_s
    if alone_s > demand.ttft_s:
        return f"an idle replica alone takes {alone_s:.3g} s to begin: no number of replicas makes that {demand.ttft_s:g} s"
    if demand.itl_s is not None and curve.speed.step_s(1) > demand.itl_s:
        return f"an idle replica alone takes {curve.speed.step_s(1):.3g} s a token: no number of replicas makes that {demand.itl_s:g} s"
    enough = math.ceil(busy_replicas(curve, demand) / MOST_BUSY)
    too_few = enough - 1
    if enough > MOST_REPLICAS:
        return TOO_MANY
    requests = demand.requests(NUM_REQUESTS)

    @cache
    def try_with(num_replicas: int) -> Kept:
        return keep(curve, demand, requests, num_replicas)

    while enough <= MOST_REPLICAS and not try_with(enough).is_enough:
        too_few, enough = enough, math.ceil(enough * GROWTH)
    if enough > MOST_REPLICAS:
        return TOO_MANY
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        too_few, enough = (too_few, middle) if try_with(middle).is_enough else (middle, enough)
    return try_with(enough)


def keep(curve: Curve, demand: Demand, requests: list[Request], num_replicas: int) -> Kept:
    """What `num_replicas` keep under `requests`."""
    replayed = Fleet(curve.speed, num_replicas).replay(requests)
    warm_s = requests[int(WARM_SHARE * len(requests))].arrival_s
    firsts_s = sorted(first_s for at_s, first_s in replayed.first_tokens_s if at_s - first_s >= warm_s)
    ttft_p50_s, ttft_share_s = (firsts_s[int(share * (len(firsts_s) - 1))] for share in (0.5, demand.share))
    itl_p50_s = sorted(replayed.gaps_s)[len(replayed.gaps_s) // 2] if replayed.gaps_s else 0.0
    # A load that is too high fills the places first, and delays first tokens only when they are full, minutes later.
    is_stable = busy_replicas(curve, demand) <= MOST_BUSY * num_replicas
    is_fast = ttft_share_s <= demand.ttft_s and (demand.itl_s is None or itl_p50_s <= demand.itl_s)
    return Kept(num_replicas, ttft_p50_s, ttft_share_s, itl_p50_s, is_fast and is_stable and not replayed.num_refused)
