"""Compares autoscaling policies on the same loads in simulated time: ours, and Ray Serve's default with its own delays and with ours.

Prints one JSON object; the loads are synthetic unless `--trace` names a recording.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from infra.config import parse
from infra.errors import SlipwayError
from serving.autoscaling.machine import Speed
from serving.autoscaling.ray_policy import LOOK_BACK_S, PUSH_S
from serving.autoscaling.scalers import OurScaler, RayScaler, Scaler
from serving.autoscaling.simulator import simulate
from serving.autoscaling.traces import Trace, make_traces, read_trace
from serving.config import AutoscaleConfig


def compare(traces: list[Trace], settings: AutoscaleConfig, speed: Speed) -> dict[str, Any]:
    """The figures of every policy on every trace; seconds."""
    results: dict[str, Any] = {}
    for trace in traces:
        results[trace.name] = {"requests": len(trace.requests), "duration_s": trace.duration_s}
        for name, scaler in make_scalers(settings).items():
            started_s = time.perf_counter()
            outcome = simulate(trace, scaler, speed, max(1, settings.min_replicas))
            results[trace.name][name] = outcome.summary(settings.target_ttft_s) | {
                "replayed_in_s": round(time.perf_counter() - started_s, 2)
            }
            print(f"{trace.name:8s} {name:16s} {results[trace.name][name]}", file=sys.stderr, flush=True)
    return results


def make_scalers(settings: AutoscaleConfig) -> dict[str, Scaler]:
    """New scalers by name."""
    our_delays = {
        "metrics_interval_s": PUSH_S,
        "look_back_period_s": LOOK_BACK_S,
        "upscale_delay_s": settings.up_delay_s,
        "downscale_delay_s": settings.down_delay_s,
        "downscale_to_zero_delay_s": settings.zero_delay_s,
    }
    return {"slipway": OurScaler(settings), "ray": RayScaler(settings), "ray_our_delays": RayScaler(settings, **our_delays)}


def main() -> None:
    """The command line."""
    defaults = AutoscaleConfig(max_replicas=4)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--min-replicas", type=int, default=defaults.min_replicas)
    parser.add_argument("--max-replicas", type=int, default=defaults.max_replicas)
    parser.add_argument("--target-requests", type=int, default=defaults.target_requests)
    parser.add_argument("--target-ttft-s", type=float, default=defaults.target_ttft_s)
    parser.add_argument("--cold-start-s", type=float, default=Speed().cold_start_s)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trace", type=Path, help="CSV with arrival_s, prompt_tokens and output_tokens, in place of the synthetic loads")
    parser.add_argument("--json", action="store_true", help="accepted for symmetry with the other commands; JSON is always the last line")
    given = parser.parse_args()
    chosen = {name: getattr(given, name) for name in ("min_replicas", "max_replicas", "target_requests", "target_ttft_s")}
    try:
        settings = parse(AutoscaleConfig, chosen, "options")
        traces = [read_trace(given.trace)] if given.trace else make_traces(given.seed)
    except SlipwayError as error:
        print(error.message, file=sys.stderr)
        sys.exit(error.exit_code)
    speed = Speed(cold_start_s=given.cold_start_s)
    is_synthetic = given.trace is None
    print(json.dumps({"synthetic": is_synthetic, "settings": settings.model_dump(), "traces": compare(traces, settings, speed)}))


if __name__ == "__main__":
    main()
