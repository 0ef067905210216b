"""Who decides in the simulator: our policy, or Ray Serve's own, each behind the lags that it has in a real Ray Serve.

Replicas and handles note figures at intervals and send what they noted at longer ones; the decision sees only what was sent.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from ray.serve._private.common import DeploymentID, TimeSeries, TimeStampedValue
from ray.serve._private.constants import RAY_SERVE_AUTOSCALING_METRIC_RECORD_INTERVAL_FACTOR
from ray.serve._private.metrics_utils import aggregate_timeseries, merge_instantaneous_total
from ray.serve.autoscaling_policy import (
    _apply_delay_logic,
    _apply_scaling_factors,
    _get_cold_start_scale_up_replicas,
    default_autoscaling_policy,
)
from ray.serve.config import AutoscalingConfig, AutoscalingContext

from serving.autoscaling import policy
from serving.autoscaling.load import ReplicaLoad
from serving.autoscaling.ray_policy import LOOK_BACK_S, PUSH_S
from serving.config import AutoscaleConfig

HELD = -1  # the series of requests held at the handle, beside those of the replicas by their numbers


class Scaler(Protocol):
    """Decides how many replicas there should be."""

    record_s: float
    """How often figures are noted."""
    push_s: float
    """How often they are sent."""

    def record(self, now_s: float, num_held: int, loads: Mapping[int, ReplicaLoad]) -> None:
        """Notes the figures of the handle and of the replicas that answer."""

    def push(self, now_s: float) -> None:
        """Sends what is noted to the one that decides."""

    def decide(self, now_s: float, num_target: int, running: Sequence[int]) -> int:
        """The replicas to ask for, from what was sent; `running` are the numbers of those that answer."""


class OurScaler:
    """Our policy, with what `ray_policy` sets."""

    push_s = PUSH_S
    record_s = min(PUSH_S, LOOK_BACK_S * RAY_SERVE_AUTOSCALING_METRIC_RECORD_INTERVAL_FACTOR)

    def __init__(self, settings: AutoscaleConfig) -> None:
        self._settings = settings
        self._state = policy.State()
        self._noted: tuple[int, dict[int, ReplicaLoad]] = (0, {})
        self._sent = self._noted

    def record(self, now_s: float, num_held: int, loads: Mapping[int, ReplicaLoad]) -> None:
        """Notes the newest figures; only they count."""
        self._noted = (num_held, dict(loads))

    def push(self, now_s: float) -> None:
        """Sends them."""
        self._sent = self._noted

    def decide(self, now_s: float, num_target: int, running: Sequence[int]) -> int:
        """What the policy says."""
        num_held, loads = self._sent
        told = tuple(loads[number] for number in running if number in loads)
        figures = policy.Figures(now_s, num_target, len(running), told, num_held)
        num_wanted, self._state = policy.decide(self._settings, self._state, figures)
        return num_wanted


class RayScaler:
    """Ray Serve's default policy, its own code with its own delays and look-back, at a time that we give.

    Source: ray 2.60, `serve/autoscaling_policy.py` and `DeploymentAutoscalingState` in `serve/_private/autoscaling_state.py`.
    """

    def __init__(self, settings: AutoscaleConfig, **options: Any) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            self._config = AutoscalingConfig(
                min_replicas=settings.min_replicas,
                max_replicas=settings.max_replicas,
                target_ongoing_requests=settings.target_requests,
                **options,
            )
        self.push_s = self._config.metrics_interval_s
        self.record_s = min(self.push_s, self._config.look_back_period_s * RAY_SERVE_AUTOSCALING_METRIC_RECORD_INTERVAL_FACTOR)
        self._state: dict[str, Any] = {}
        self._noted: dict[int, TimeSeries] = {}
        self._sent: dict[int, TimeSeries] = {}

    def record(self, now_s: float, num_held: int, loads: Mapping[int, ReplicaLoad]) -> None:
        """Adds a point to every series."""
        self._noted.setdefault(HELD, []).append(TimeStampedValue(now_s, num_held))
        for number, load in loads.items():
            self._noted.setdefault(number, []).append(TimeStampedValue(now_s, load.num_running + load.num_waiting))

    def push(self, now_s: float) -> None:
        """Sends the series without what is older than the look-back."""
        oldest_s = now_s - self._config.look_back_period_s
        recent = {number: [point for point in series if point.timestamp > oldest_s] for number, series in self._noted.items()}
        self._noted = {number: series for number, series in recent.items() if series}
        self._sent = {number: list(series) for number, series in self._noted.items()}

    def decide(self, now_s: float, num_target: int, running: Sequence[int]) -> int:
        """What Ray Serve would ask for."""
        context = self._context(now_s, num_target, running)
        num_wanted = _get_cold_start_scale_up_replicas(context)
        if num_wanted is None:
            desired, _ = default_autoscaling_policy(context)
            num_wanted = _apply_scaling_factors(desired, len(running), self._config)
            if running or num_wanted <= 0:
                num_wanted, self._state = _apply_delay_logic(max(0, num_wanted), num_target, self._config, self._state, _now=now_s)
        return int(max(self._config.min_replicas, min(self._config.max_replicas, num_wanted)))

    def _context(self, now_s: float, num_target: int, running: Sequence[int]) -> AutoscalingContext:
        return AutoscalingContext(
            deployment_id=DeploymentID("model"),
            deployment_name="model",
            app_name=None,
            current_num_replicas=len(running),
            target_num_replicas=num_target,
            running_replicas=[],
            total_num_requests=self._mean(now_s, [self._sent[number] for number in (HELD, *running) if number in self._sent]),
            total_queued_requests=None,
            aggregated_metrics=None,
            raw_metrics=None,
            capacity_adjusted_min_replicas=self._config.min_replicas,
            capacity_adjusted_max_replicas=self._config.max_replicas,
            policy_state={},
            last_scale_up_time=None,
            last_scale_down_time=None,
            current_time=now_s,
            config=self._config,
        )

    def _mean(self, now_s: float, series: list[TimeSeries]) -> float:
        """The sum of the series, averaged over the time since all of them have begun."""
        merged = merge_instantaneous_total(series)
        if not merged:
            return 0.0
        begun_s = max(max(points[0].timestamp for points in series), merged[0].timestamp)
        mean = aggregate_timeseries(
            merged,
            self._config.aggregation_function,
            last_window_s=max(now_s - merged[-1].timestamp, 1e-3),
            window_start=begun_s if len(series) > 1 and begun_s <= merged[-1].timestamp else None,
        )
        return mean or 0.0
