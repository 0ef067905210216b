"""helm/training, rendered by the real helm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from infra.config import load
from infra.errors import ConfigError
from pipelines.charts import render
from pipelines.spec import Spec
from pipelines.training_chart import Values
from tests.charts.objects import environment, only, pod_templates

STORE = {"url": "s3://bucket/slipway", "existingSecret": "store-keys"}
SPEC = {
    "name": "smart-home",
    "base_model": "hf:owner/model",
    "dataset": {"type": "files", "train": ["/data/train.jsonl", {"path": "hf:owner/rows", "weight": 0.25}]},
    "train": {"learning_rate": 0.00002, "max_steps": 40_000_000, "num_workers": [1, 4]},
}
PIPELINE = {
    "store": STORE,
    "tracking": {"uri": "http://mlflow:5000"},
    "config": SPEC,
    "pipeline": {"enabled": True, "schedule": "0 3 * * *"},
}


def job_values(**changes: Any) -> dict[str, Any]:
    """Values of one RayJob."""
    job = {"enabled": True, "name": "slipway-train-0123", "job": "staging/train-0123/config.json", **changes.pop("rayJob", {})}
    return {"store": STORE, "rayJob": job, **changes}


def cluster_of(values: dict[str, Any]) -> dict[str, Any]:
    """The Ray cluster of the one RayJob that they render."""
    cluster: dict[str, Any] = only(render("training", values, name="nightly"), "RayJob")["spec"]["rayClusterSpec"]
    return cluster


def test_rayjob_with_a_range_of_workers_has_pods_for_the_most_and_keeps_the_least() -> None:
    """Three to twenty workers at eight a pod are one to three pods; the head takes none of them."""
    cluster = cluster_of(job_values(rayJob={"numWorkers": [3, 20]}, workers={"workersPerPod": 8}))
    (group,) = cluster["workerGroupSpecs"]
    assert (group["minReplicas"], group["replicas"], group["maxReplicas"]) == (1, 1, 3)
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert cluster["enableInTreeAutoscaling"] is True


def test_rayjob_with_a_range_of_workers_gives_the_autoscaler_alone_a_word_to_kubernetes() -> None:
    """What users train runs beside it in the head's pod."""
    cluster = cluster_of(job_values(rayJob={"numWorkers": [1, 4]}))
    pod = cluster["headGroupSpec"]["template"]["spec"]
    (volume,) = (each["name"] for each in pod["volumes"] if "projected" in each)
    assert pod["automountServiceAccountToken"] is False
    assert volume in [mount["name"] for mount in cluster["autoscalerOptions"]["volumeMounts"]]
    assert volume not in [mount["name"] for mount in pod["containers"][0]["volumeMounts"]]


@pytest.mark.parametrize("changes", [{"numWorkers": 3}, {"numWorkers": [3, 3]}, {"numWorkers": [1, 3], "queueName": "team"}])
def test_rayjob_with_one_number_of_workers_or_a_queue_asks_for_all_at_once(changes: dict[str, Any]) -> None:
    """Kueue admits what a job asks for at its start; KubeRay's autoscaler would change that later."""
    cluster = cluster_of(job_values(rayJob=changes))
    assert cluster["workerGroupSpecs"][0]["replicas"] == 3
    assert "enableInTreeAutoscaling" not in cluster


def test_rayjob_of_one_process_is_one_pod_with_the_resources_of_solo() -> None:
    """A merge needs no workers, and its pod must be able to hold it."""
    cluster = cluster_of(job_values(solo={"resources": {"limits": {"memory": "99Gi", "nvidia.com/gpu": 1}}}))
    head = cluster["headGroupSpec"]
    assert "workerGroupSpecs" not in cluster
    assert "num-cpus" not in head["rayStartParams"]
    assert head["template"]["spec"]["containers"][0]["resources"]["limits"] == {"memory": "99Gi", "nvidia.com/gpu": "1"}


def test_rayjob_of_an_engine_is_one_pod_in_the_image_of_the_engine() -> None:
    """The training image holds no engine, and answers must come from the one that will serve."""
    values = job_values(rayJob={"engine": "vllm", "module": "serving.predict"}, engines={"vllm": {"image": {"tag": "9"}}})
    job = only(render("training", values, name="nightly"), "RayJob")["spec"]
    pods = list(pod_templates(job))
    head = job["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    assert {container["image"] for pod in pods for container in pod["spec"]["containers"]} == {"slipway-serve-gpu:9"}
    assert head["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert "workerGroupSpecs" not in job["rayClusterSpec"]


def test_rayjob_with_a_queue_carries_the_labels_of_kueue() -> None:
    """Without one it must not: Kueue would hold it for ever."""
    queued = only(render("training", job_values(rayJob={"queueName": "team", "queuePriorityClass": "low"}), name="n"), "RayJob")
    free = only(render("training", job_values(), name="n"), "RayJob")
    assert queued["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team"
    assert queued["metadata"]["labels"]["kueue.x-k8s.io/priority-class"] == "low"
    assert not [label for label in free["metadata"]["labels"] if "kueue" in label]


def test_rayjob_by_http_has_no_submitter_pod() -> None:
    """The operator refuses nothing there, but the pod would never run."""
    spec = only(render("training", job_values(rayJob={"submissionMode": "HTTPMode"}), name="n"), "RayJob")["spec"]
    assert "submitterPodTemplate" not in spec
    assert "submitterConfig" not in spec


def test_pods_of_ray_have_no_name_label_of_ours() -> None:
    """KubeRay's Services find a head by `app.kubernetes.io/name: kuberay`, which it sets unless we do."""
    cluster = cluster_of(job_values(rayJob={"numWorkers": 2}))
    labels = [pod["metadata"]["labels"] for pod in pod_templates(cluster)]
    assert len(labels) == 2
    assert not [each for each in labels if "app.kubernetes.io/name" in each]


def test_spec_in_the_config_map_is_the_spec_of_the_values(tmp_path: Path) -> None:
    """Large and small numbers too, which a template that prints them would spoil."""
    data = only(render("training", PIPELINE, name="nightly"), "ConfigMap")["data"]
    file = tmp_path / "spec.yaml"
    file.write_text(data["spec.yaml"])
    assert load(Spec, file) == Spec.model_validate(SPEC)


def test_values_for_the_executor_render_one_rayjob_of_the_same_release() -> None:
    """Exactly one object: accounts, policies and monitors are the release's, and the job runs under them."""
    extras = {
        "workers": {"workersPerPod": 2, "nodeSelector": {"pool": "gpu"}},
        "env": [{"name": "HF_TOKEN", "secret": {"name": "hub", "key": "token"}}],
        "monitor": {"enabled": True},
        "volumes": [{"existingClaim": "data", "path": "/data"}],
        "rayJob": {"queueName": "team", "backoffLimit": 7},
    }
    release = render("training", {**PIPELINE, **extras}, name="nightly", api_versions=["monitoring.coreos.com/v1"])
    values = yaml.safe_load(only(release, "ConfigMap")["data"]["kubernetes.yaml"])
    values["rayJob"] |= {"enabled": True, "name": "slipway-train-0123", "job": "staging/train-0123/config.json", "numWorkers": 4}
    (job,) = render("training", values, name="slipway-train-0123", api_versions=["monitoring.coreos.com/v1"])
    worker = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]
    assert job["spec"]["backoffLimit"] == 7
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team"
    assert worker["spec"]["serviceAccountName"] == only(release, "ServiceAccount", "-jobs")["metadata"]["name"]
    assert worker["spec"]["nodeSelector"] == {"pool": "gpu"}
    assert worker["metadata"]["labels"]["slipway.dev/deployment"] == "nightly"
    assert environment(worker["spec"]["containers"][0])["SLIPWAY_STORE"] == STORE["url"]
    monitored = only(release, "PodMonitor")["spec"]["selector"]["matchLabels"]
    assert monitored.items() <= worker["metadata"]["labels"].items()


def test_driver_reads_the_mounted_spec_and_values() -> None:
    """Both in the Job and in the CronJob's template."""
    objects = render("training", PIPELINE, name="nightly")
    pods = [*pod_templates(only(objects, "Job")), *pod_templates(only(objects, "CronJob"))]
    assert len(pods) == 2
    for pod in pods:
        (container,) = pod["spec"]["containers"]
        mount = next(each for each in container["volumeMounts"] if each["name"] == "config")
        assert container["args"][:2] == ["run", f"{mount['mountPath']}/spec.yaml"]
        assert environment(container)["SLIPWAY_KUBERNETES_VALUES"] == f"{mount['mountPath']}/kubernetes.yaml"
        assert pod["spec"]["volumes"][0]["configMap"]["name"] == only(objects, "ConfigMap")["metadata"]["name"]


def test_driver_signs_with_the_key_that_is_mounted() -> None:
    """Its variable names a file of the Secret's volume; `existingSecret` of another chart's key would not be found there."""
    values = {**PIPELINE, "signing": {"existingSecret": "signing"}}
    spec = only(render("training", values, name="nightly"), "Job")["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    mount = next(each for each in container["volumeMounts"] if each["name"] == "signing")
    volume = next(each for each in spec["volumes"] if each["name"] == "signing")
    assert environment(container)["SLIPWAY_SIGNING_KEY"] == f"{mount['mountPath']}/signing.pem"
    assert volume["secret"]["secretName"] == "signing"


def test_driver_job_is_not_tried_again_after_bad_input_or_a_refused_gate() -> None:
    """Exit codes 2 and 3; 75, and a lost node, are."""
    rules = only(render("training", PIPELINE, name="nightly"), "Job")["spec"]["podFailurePolicy"]["rules"]
    assert {rule["action"]: rule.get("onExitCodes", {}).get("values") for rule in rules} == {"Ignore": None, "FailJob": [2, 3]}


def test_driver_job_of_another_spec_has_another_name_and_of_the_same_spec_the_same() -> None:
    """A Job cannot be changed, so an upgrade with the same name would be refused."""

    def name(**changes: Any) -> str:
        return str(only(render("training", {**PIPELINE, **changes}, name="nightly"), "Job")["metadata"]["name"])

    assert name() == name(annotations={"a": "b"})
    assert name() != name(config={**SPEC, "name": "other"})
    assert name() != name(pipeline={**PIPELINE["pipeline"], "runAgain": "monday"})


def test_role_of_the_driver_reaches_no_secret_and_makes_no_pod() -> None:
    """Least privilege: whoever runs the driver can start RayJobs and look, no more."""
    rules = only(render("training", PIPELINE, name="nightly"), "Role")["rules"]
    granted = {(resource, verb) for rule in rules for resource in rule["resources"] for verb in rule["verbs"]}
    assert ("rayjobs", "create") in granted
    assert not [pair for pair in granted if "*" in pair or pair[0] in ("secrets", "pods/exec")]
    assert {resource for resource, verb in granted if verb not in ("get", "list", "watch")} == {"rayjobs"}


def test_store_on_a_volume_is_mounted_at_its_path_in_every_pod_that_uses_it() -> None:
    """The driver, and Ray's head and workers; the submitter has no need of it."""
    values = {**PIPELINE, "store": {"url": "file:///mnt/store", "existingClaim": "shared"}, **{"rayJob": job_values()["rayJob"]}}
    values["rayJob"] = {**values["rayJob"], "numWorkers": 2}
    mounts = [
        (container["name"], mount["mountPath"])
        for pod in pod_templates(render("training", values, name="nightly"))
        for container in pod["spec"]["containers"]
        for mount in container["volumeMounts"]
        if mount["name"] == "store"
    ]
    assert sorted(mounts) == [("driver", "/mnt/store"), ("driver", "/mnt/store"), ("ray-head", "/mnt/store"), ("ray-worker", "/mnt/store")]


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"store": STORE, "pipeline": {"enabled": True}}, "config is empty"),
        ({"config": SPEC, "pipeline": {"schedule": "@daily"}}, r"needs store\.url"),
        ({"config": SPEC, "store": STORE, "pipeline": {"enabled": True}}, r"needs tracking\.uri"),
        (job_values(rayJob={"engine": "llama"}), "'llama' is none of engines: openvino, torch, vllm".replace("'", '"')),
        (job_values(rayJob={"engine": "vllm", "numWorkers": 2}), "one pod alone"),
        ({"store": STORE, "rayJob": {"enabled": True}}, r"needs rayJob\.job"),
        (job_values(store={}), r"needs store\.url"),
        (job_values(rayJob={"numWorkers": [4, 2]}), "larger number first"),
        (job_values(store={**STORE, "existingClaim": "shared"}), r"store\.existingClaim is mounted"),
        (job_values(store={"url": "file:///mnt/store"}), r"store\.existingClaim"),
        ({"config": {**SPEC, "train": {"epochz": 1}}}, "/config/train.*epochz"),
        ({"config": {**SPEC, "train": {"epochs": "two"}}}, "/config/train/epochs.*got string"),
        (job_values(env=[{"name": "A", "value": "1"}, {"name": "A", "value": "2"}]), "env A is given twice"),
        (job_values(env=[{"name": "HOME", "value": "/x"}]), "/env/0/name"),
        (job_values(labels={"a b": "c"}), "/labels.*'a b' not allowed"),
        (job_values(head={"nodeSelector": {"a..b/c": "d"}}), "nodeSelector"),
        (job_values(env=[{"name": "A"}]), "env A: give `value` or `secret`"),
        (job_values(env=[{"name": "A", "value": "1", "secret": {"name": "s", "key": "k"}}]), "env A: give `value` or `secret`"),
        ({"image": {"tag": "latest"}}, "/image/tag"),
        ({"rayJob": {"job": "x; rm -rf /"}}, "/rayJob/job"),
        ({"workers": {"resources": {"limits": {"memory": "12 GB"}}}}, "/workers/resources/limits/memory"),
        ({"labels": {"app.kubernetes.io/part-of": "x"}}, "/labels/app"),
        ({"pipeline": {"schedule": "every day"}}, "/pipeline/schedule"),
    ],
)
def test_values_that_are_wrong_are_refused_with_their_path(values: dict[str, Any], text: str) -> None:
    """By the schema where it can, by the template where two values contradict each other."""
    with pytest.raises(ConfigError, match=f"(?s){text}"):
        render("training", values, name="nightly")


@pytest.mark.parametrize("name", ["a" * 41, "7up"])
def test_release_name_that_no_object_can_bear_is_refused(name: str) -> None:
    """Rather than by the cluster, object by object; another name for the objects does."""
    with pytest.raises(ConfigError, match="fullnameOverride"):
        render("training", job_values(), name=name)
    assert only(render("training", job_values(fullnameOverride="short"), name=name), "ServiceAccount")["metadata"]["name"] == "short-jobs"


@pytest.mark.parametrize(
    "values",
    [
        {"pipeline": {"enabled": True}, "store": STORE},
        {"rayJob": {"enabled": True}, "store": STORE},
        {"rayJob": {"engine": "llama"}},
        {"store": {"url": "file:///mnt/x"}},
        {"workers": {"resources": {"requests": {"memory": "2Gi"}, "limits": {"memory": "1G"}}}},
        {"image": {"tag": "latest"}},
        {"env": [{"name": "A", "value": "1"}, {"name": "A", "value": "2"}]},
        {"env": [{"name": "SLIPWAY_HOME", "value": "/x"}]},
        {"labels": {"slipway.dev/deployment": "x"}},
    ],
)
def test_values_that_contradict_each_other_are_refused_by_the_model(values: dict[str, Any]) -> None:
    """`slipway deploy` asks the model before it renders."""
    with pytest.raises(ValidationError):
        Values.model_validate(values)
