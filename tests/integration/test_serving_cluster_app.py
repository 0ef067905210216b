"""The application that the chart names, built and read as Ray Serve does, without a cluster."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from infra.errors import ConfigError
from pipelines.charts import render
from serving import cluster_app

POOLS = [
    {"name": "cpu", "cpus_per_replica": 2, "autoscale": {"min_replicas": 0, "max_replicas": 1}},
    {"name": "gpu", "accelerator": "gpu", "engine": "vllm", "cpus_per_replica": 4, "num_replicas": 1},
]


@pytest.fixture(scope="module")
def applications() -> list[dict[str, Any]]:
    """Those of a model with two pools."""
    config = {"model_name": "lamp", "model": {"digest": "a" * 64}, "serve": {"allow_unsigned": ["lamp"], "pools": POOLS}}
    values = {"store": {"url": "s3://models/slipway"}, "workerGroups": {"gpu": {"enabled": True}}, "config": config}
    (service,) = [each for each in render("serving", values, name="lamp") if each["kind"] == "RayService"]
    found: dict[str, Any] = yaml.safe_load(service["spec"]["serveConfigV2"])
    ServeDeploySchema.model_validate(found)
    return list(found["applications"])


def test_pool_on_gpus_asks_for_one_and_for_a_node_with_its_image(applications: list[dict[str, Any]]) -> None:
    assert applications[1]["import_path"] == "serving.cluster_app:build"
    deployment = cluster_app.build(applications[1]["args"])._bound_deployment
    assert deployment.ray_actor_options == {"num_cpus": 4, "num_gpus": 1, "resources": {"slipway_gpu": cluster_app.A_LITTLE}}
    assert (deployment.name, deployment.num_replicas) == ("model", 1)


def test_pool_that_may_sleep_has_a_bell_in_front(applications: list[dict[str, Any]]) -> None:
    bell = cluster_app.build(applications[0]["args"])._bound_deployment
    assert bell.name == "bell"
    assert bell.ray_actor_options["num_cpus"] == 0
    (model,) = bell.init_args
    assert model._bound_deployment.ray_actor_options["resources"] == {"slipway_cpu": cluster_app.A_LITTLE}


def test_pool_that_the_config_has_not_is_refused(applications: list[dict[str, Any]]) -> None:
    with pytest.raises(ConfigError, match=r"pool 'tpu': the config has \['cpu', 'gpu'\]"):
        cluster_app.build({**applications[0]["args"], "pool": "tpu"})
