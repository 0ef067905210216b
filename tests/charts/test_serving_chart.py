"""helm/serving: what its objects say of each other, what its programs are told, and what it refuses."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from infra.config import parse
from infra.errors import ConfigError
from pipelines.charts import CHARTS_DIR, REPOSITORY, profiles, render
from serving.chart import Values
from serving.cluster_config import ClusterArguments, ClusterConfig
from serving.config import ServeJob

MONITORING, GATEWAY_API = "monitoring.coreos.com/v1", "gateway.networking.k8s.io/v1"
BASE: dict[str, Any] = {
    "store": {"url": "s3://models/slipway"},
    "config": {"model_name": "lamp", "model": {"type": "store", "digest": "a" * 64}, "serve": {"allow_unsigned": ["lamp"]}},
}
SLEEPS = {"min_replicas": 0, "max_replicas": 1}
POOLS = [
    {"name": "cpu", "cpus_per_replica": 2, "autoscale": SLEEPS},
    {"name": "gpu", "accelerator": "gpu", "engine": "vllm", "cpus_per_replica": 4},
]
GPU_GROUP = {"workerGroups": {"gpu": {"enabled": True}}}


def merged(*several: dict[str, Any]) -> dict[str, Any]:
    """The mappings over each other, as Helm merges values."""
    result: dict[str, Any] = {}
    for values in several:
        for key, value in copy.deepcopy(values).items():
            result[key] = merged(result[key], value) if isinstance(value, dict) and isinstance(result.get(key), dict) else value
    return result


def serve(**settings: Any) -> dict[str, Any]:
    return {"config": {"serve": settings}}


def rendered(*several: dict[str, Any], profile: str | None = None) -> list[dict[str, Any]]:
    return render("serving", merged(BASE, *several), name="lamp", profile=profile, api_versions=[MONITORING, GATEWAY_API])


def one(manifests: list[dict[str, Any]], kind: str, name: str) -> dict[str, Any]:
    (found,) = [each for each in manifests if (each["kind"], each["metadata"]["name"]) == (kind, name)]
    return found


def applications(manifests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = yaml.safe_load(one(manifests, "RayService", "lamp-model")["spec"]["serveConfigV2"])["applications"]
    return found


def ray_pods(manifests: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Pod specs of the Ray cluster by the name of their group."""
    cluster = one(manifests, "RayService", "lamp-model")["spec"]["rayClusterConfig"]
    workers = {group["groupName"]: group["template"]["spec"] for group in cluster["workerGroupSpecs"]}
    return {"head": cluster["headGroupSpec"]["template"]["spec"], **workers}


def variables(pod: dict[str, Any]) -> dict[str, str]:
    return {each["name"]: each["value"] for each in pod["containers"][0]["env"]}


@pytest.mark.parametrize("profile", profiles("serving"))
def test_config_reaches_gateways_and_replicas_as_the_values_have_it(profile: str) -> None:
    given = yaml.safe_load((CHARTS_DIR / "serving" / f"values-{profile}.yaml").read_text())
    manifests = rendered(profile=profile)
    wanted = Values.model_validate(merged(Values().model_dump(mode="json", by_alias=True, exclude_none=True), given, BASE)).config
    in_gateways = yaml.safe_load(one(manifests, "ConfigMap", "lamp-gateway")["data"]["config.yaml"])
    assert parse(ClusterConfig, in_gateways, "ConfigMap") == wanted
    (application,) = applications(manifests)
    assert parse(ClusterArguments, application["args"], "args") == ClusterArguments(config=wanted)


def test_applications_are_one_a_pool_and_only_those_that_sleep_have_a_bell() -> None:
    found = applications(rendered(GPU_GROUP, serve(pools=POOLS)))
    config = parse(ClusterArguments, found[0]["args"], "args").config
    jobs = ServeJob(output_dir=Path("x"), model_dir=Path("x"), model_name="lamp", serve=config.serve).per_pool
    assert [each["name"] for each in found] == [job.application_name for job in jobs]
    assert [each["args"]["pool"] for each in found] == list(config.per_pool)
    assert [each["route_prefix"] for each in found] == [config.wake_path("cpu"), None]
    (alone,) = applications(rendered(serve(autoscale=SLEEPS)))
    assert alone["route_prefix"] == config.wake_path("")


def test_gateways_are_found_by_the_name_and_port_of_their_headless_service() -> None:
    manifests = rendered(serve(autoscale=SLEEPS))
    service = one(manifests, "Service", "lamp-gateways")["spec"]
    host, _, port = variables(ray_pods(manifests)["cpu"])["SLIPWAY_GATEWAYS"].rpartition(":")
    assert (host, int(port)) == ("lamp-gateways", service["ports"][0]["port"])
    assert service["clusterIP"] == "None"
    assert service["publishNotReadyAddresses"], "a gateway becomes ready by the replicas that look it up"
    gateway = one(manifests, "Deployment", "lamp-gateway")["spec"]["template"]["spec"]
    assert int(port) in [each["containerPort"] for each in gateway["containers"][0]["ports"]]
    assert variables(gateway)["SLIPWAY_WAKE_URL"] == "http://lamp-model-head-svc:8000"


def test_policy_of_workers_opens_the_replicas_ports_to_gateways_alone() -> None:
    manifests = rendered({"config": {"first_replica_port": 30000, "num_replica_ports": 10}})
    rules = one(manifests, "NetworkPolicy", "lamp-ray-worker")["spec"]["ingress"]
    (replicas,) = [rule for rule in rules if any("endPort" in port for port in rule.get("ports", []))]
    assert replicas["ports"] == [{"port": 30000, "endPort": 30009}]
    assert replicas["from"][0]["podSelector"] == {"matchLabels": one(manifests, "Service", "lamp-gateway")["spec"]["selector"]}


@pytest.mark.parametrize("profile", profiles("serving"))
def test_pods_have_longer_to_end_than_their_answers(profile: str) -> None:
    manifests = rendered(profile=profile)
    gateway = one(manifests, "Deployment", "lamp-gateway")["spec"]["template"]["spec"]
    config = parse(ClusterConfig, yaml.safe_load(one(manifests, "ConfigMap", "lamp-gateway")["data"]["config.yaml"]), "ConfigMap")
    drain_s = config.serve.drain_timeout_s
    assert gateway["terminationGracePeriodSeconds"] > config.leave_s + drain_s
    for group, pod in ray_pods(manifests).items():
        if group != "head":
            told = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
            assert float(told[-1]) == drain_s < pod["terminationGracePeriodSeconds"]
            assert float(variables(pod)["RAY_gcs_rpc_server_reconnect_timeout_s"]) > drain_s, "replicas outlive the head so long"


def test_pods_of_ray_are_selected_by_kuberay_and_by_us() -> None:
    manifests = rendered()
    cluster = one(manifests, "RayService", "lamp-model")["spec"]["rayClusterConfig"]
    for component, group in (("ray-head", cluster["headGroupSpec"]), ("ray-worker", cluster["workerGroupSpecs"][0])):
        labels = group["template"]["metadata"]["labels"]
        assert "app.kubernetes.io/name" not in labels, "KubeRay's Service of the head selects by its own"
        assert labels["app.kubernetes.io/component"] == component
    budget = one(manifests, "PodDisruptionBudget", "lamp-ray-worker")["spec"]["selector"]["matchLabels"]
    assert budget.items() <= cluster["workerGroupSpecs"][0]["template"]["metadata"]["labels"].items()


def test_groups_offer_what_replicas_ask_for() -> None:
    manifests = rendered(GPU_GROUP, {"workerGroups": {"cpu": {"resources": {"limits": {"cpu": "4500m"}}}}}, serve(pools=POOLS))
    groups = {
        group["groupName"]: group for group in one(manifests, "RayService", "lamp-model")["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    }
    assert groups["cpu"]["resources"] == {"CPU": "4", "GPU": "0", "slipway_cpu": "1"}
    assert groups["gpu"]["resources"] == {"CPU": "4", "GPU": "1", "slipway_gpu": "1"}
    images = {name: group["template"]["spec"]["containers"][0]["image"] for name, group in groups.items()}
    assert images == {"cpu": "slipway-serve-cpu:0.1.0", "gpu": "slipway-serve-gpu:0.1.0"}


def test_word_to_kubernetes_is_the_autoscalers_alone() -> None:
    manifests = rendered({"autoscaler": {"enabled": True}, "workerGroups": {"cpu": {"maxReplicas": 3}}})
    head = ray_pods(manifests)["head"]
    mounts = {mount["name"] for mount in head["containers"][0]["volumeMounts"]}
    options = one(manifests, "RayService", "lamp-model")["spec"]["rayClusterConfig"]["autoscalerOptions"]
    assert "kubernetes-token" in {mount["name"] for mount in options["volumeMounts"]} - mounts
    pods = [*ray_pods(manifests).values(), one(manifests, "Deployment", "lamp-gateway")["spec"]["template"]["spec"]]
    assert [pod["automountServiceAccountToken"] for pod in pods] == [False] * 3


def test_alerts_and_monitors_ask_for_figures_that_there_are() -> None:
    everything = {"monitoring": {"rules": {"enabled": True}, "gateways": {"enabled": True}, "ray": {"enabled": True}}}
    manifests = rendered(everything)
    rules = one(manifests, "PrometheusRule", "lamp-model")["spec"]["groups"][0]["rules"]
    recorded = {rule["record"] for rule in rules if "record" in rule}
    asked = {name for rule in rules for name in re.findall(r"([a-z]+[a-z0-9_:]*)\{", rule["expr"])} - recorded
    source = "".join((REPOSITORY / "serving" / name).read_text() for name in ("metrics.py", "front/figures.py"))
    missing = [name for name in asked if f'"{re.sub("_(total|bucket)$", "", name)}"' not in source]
    assert len(asked) > 7
    assert missing == []
    assert one(manifests, "ServiceMonitor", "lamp-gateway")["spec"]["endpoints"][0]["params"] == {"of": ["counted"]}


def test_dashboard_is_the_one_of_the_repository() -> None:
    dashboard = one(rendered({"monitoring": {"dashboard": {"enabled": True}}}), "ConfigMap", "lamp-dashboard")
    assert dashboard["data"]["slipway-serving.json"].strip() == (REPOSITORY / "infra" / "grafana" / "serving.json").read_text().strip()


def test_kinds_that_the_cluster_lacks_are_left_out() -> None:
    everything = {"monitoring": {name: {"enabled": True} for name in ("rules", "gateways", "ray", "dashboard")}}
    kinds = {each["kind"] for each in render("serving", merged(BASE, everything), name="lamp")}
    assert kinds.isdisjoint({"PrometheusRule", "ServiceMonitor", "PodMonitor"})
    assert "ConfigMap" in kinds


INCREMENTAL = {"upgrade": {"type": "NewClusterWithIncrementalUpgrade", "gatewayClassName": "envoy"}}
MISUSE = {
    "no model": ({"config": {"model": {"digest": "0" * 64}}}, "all zeros"),
    "no store": ({"store": {"url": ""}}, r"store\.url is empty"),
    "no tracking": ({"config": {"model": {"type": "registry", "name": "lamp", "version": "1"}}}, r"tracking\.uri is empty"),
    "a store of each pod": ({"store": {"url": "file:///mnt/x"}}, "existingClaim"),
    "own host": (serve(host="127.0.0.1"), "only a gateway's own pod"),
    "adapters of a machine": (serve(adapters={"red": "folder"}), r"config\.adapters"),
    "keys not asked for": ({"apiKeys": {"existingSecret": "keys"}}, "no request is asked for a key"),
    "keys from nowhere": (serve(api_keys_file="/etc/slipway/api-keys/api_keys.json"), r"apiKeys\.existingSecret is empty"),
    "trust not asked for": ({"trustedKeys": {"pem": "x"}}, "not where it is mounted"),
    "trust from nowhere": (serve(trusted_keys_file="/etc/slipway/trusted/trusted.pem"), "neither pem nor existingConfigMap"),
    "nobody trusted": (serve(allow_unsigned=[]), "no key is trusted"),
    "probes refused": (serve(open_paths=["/metrics"]), "lacks /health"),
    "scrapes refused": (merged(serve(open_paths=["/health"]), {"monitoring": {"gateways": {"enabled": True}}}), "lacks /metrics"),
    "no cores": (serve(pools=[{"name": "gpu", "accelerator": "gpu"}]), "pool gpu wants 1 replicas of 4 cores on gpu nodes"),
    "no room": (serve(num_replicas=2), "room for 1"),
    "bounds crossed": ({"workerGroups": {"cpu": {"minReplicas": 2}}}, "above maxReplicas"),
    "nobody scales": ({"workerGroups": {"cpu": {"maxReplicas": 2}}}, r"autoscaler\.enabled is false"),
    "incremental without autoscaler": (INCREMENTAL, "KubeRay moves capacity by it"),
    "incremental without class": (merged(INCREMENTAL, {"upgrade": {"gatewayClassName": ""}}), "Name a GatewayClass"),
    "ingress without host": ({"ingress": {"enabled": True, "tlsSecret": "x"}}, r"ingress\.host"),
    "ingress in the clear": ({"ingress": {"enabled": True, "host": "a.example"}}, "allowPlainHttp"),
    "route without parent": ({"route": {"enabled": True}}, "parentRefs"),
    "gateway bounds crossed": ({"gateway": {"autoscaling": {"enabled": True, "minReplicas": 9}}}, "above maxReplicas"),
    "a variable of ours": ({"env": [{"name": "SLIPWAY_HOME", "value": "/x"}]}, "/env/0/name"),
    "a variable twice": ({"env": [{"name": "A", "value": "1"}, {"name": "A", "value": "2"}]}, "env names A twice"),
    "typo": ({"gateway": {"replica": 3}}, "(?s)/gateway.*replica"),
    "wrong type": (serve(num_replicas="many"), "/config/serve/num_replicas"),
    "latest": ({"cpuImage": {"tag": "latest"}}, "/cpuImage/tag"),
}


@pytest.mark.parametrize("values", MISUSE.values(), ids=MISUSE.keys())
def test_values_that_contradict_each_other_are_refused(values: tuple[dict[str, Any], str]) -> None:
    wrong, said = values
    with pytest.raises(ConfigError, match=said):
        rendered(wrong)


def test_values_with_several_problems_are_refused_with_all_of_them() -> None:
    with pytest.raises(ConfigError, match=r"(?s)3 problem\(s\).*store\.url.*no key is trusted.*room for 1"):
        rendered({"store": {"url": ""}}, serve(allow_unsigned=[], num_replicas=3))


def test_gateway_api_that_the_cluster_lacks_is_an_error_where_it_is_asked_for() -> None:
    wanted = merged(BASE, {"route": {"enabled": True, "parentRefs": [{"name": "public"}]}})
    with pytest.raises(ConfigError, match="Install the Gateway API"):
        render("serving", wanted, name="lamp")
