"""The policy as Ray Serve calls it, and what must be set so that figures reach it in time.

Ray Serve pickles this module by value and everything that it imports by name, so it holds nothing else.
"""

from __future__ import annotations

import logging
import warnings
from dataclasses import asdict, fields
from typing import Any

from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy

from serving.autoscaling.load import ReplicaLoad
from serving.autoscaling.policy import Figures, State, decide
from serving.config import AutoscaleConfig, ServeConfig

PUSH_S = 0.5  # Ray's own 10 s would be most of the time in which a burst is to be answered
LOOK_BACK_S = 2.0  # only for requests held at a handle; a fifth of it is how often figures are noted
STATE_KEY = "slipway"


class ReplicaPolicy:
    """Decides for one deployment; Ray Serve's controller makes one and calls it ten times a second."""

    def __init__(self, **settings: Any) -> None:
        self._settings = AutoscaleConfig.model_validate(settings)

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """Replicas to ask for, and the state that Ray Serve keeps until the next call."""
        figures = read_figures(context)
        num_wanted, state = decide(self._settings, context.policy_state.get(STATE_KEY) or State(), figures)
        if num_wanted != figures.num_target:
            logging.getLogger("ray.serve").info(f"Replicas: {figures.num_target} -> {num_wanted}, by {asdict(figures)}.")
        return num_wanted, {STATE_KEY: state}


def read_figures(context: AutoscalingContext) -> Figures:
    """The newest figures of each replica; what is averaged over the look-back would come late."""
    names = [field.name for field in fields(ReplicaLoad)]
    series = context.raw_metrics or {}
    told = [replica for replica in context.running_replicas if all(series.get(name, {}).get(replica) for name in names)]
    return Figures(
        now_s=context.current_time or 0.0,
        num_target=context.target_num_replicas,
        num_replicas=context.current_num_replicas,
        loads=tuple(ReplicaLoad(**{name: series[name][replica][-1].value for name in names}) for replica in told),
        num_held=round(context.total_queued_requests),
    )


def ray_options(config: ServeConfig) -> dict[str, Any]:
    """The options of the deployment that say how many replicas it has."""
    if config.autoscale is None:
        return {"num_replicas": config.num_replicas}
    policy = AutoscalingPolicy(policy_function=ReplicaPolicy, policy_kwargs=config.autoscale.model_dump(mode="json"))
    with warnings.catch_warnings():
        # The variables that are to replace `metrics_interval_s` are read nowhere in Ray 2.60.
        warnings.filterwarnings("ignore", "The `metrics_interval_s` field", DeprecationWarning)
        autoscaling = AutoscalingConfig(
            min_replicas=config.autoscale.min_replicas,
            max_replicas=config.autoscale.max_replicas,
            initial_replicas=config.first_replicas,
            metrics_interval_s=PUSH_S,
            look_back_period_s=LOOK_BACK_S,
            upscale_delay_s=0.0,  # the policy has its own
            downscale_delay_s=0.0,
            downscale_to_zero_delay_s=0.0,
            policy=policy,
        )
    return {"autoscaling_config": autoscaling}
