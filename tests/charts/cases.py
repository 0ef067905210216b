"""What the charts are rendered with: each chart by itself, with every profile, and with each of its optional parts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipelines.charts import Chart, profiles

KUBE_VERSIONS = ("1.30.0", "1.34.0", "1.37.0")
"""The oldest that the charts take, one between, and the newest whose schemas are here."""
MONITORING = ("monitoring.coreos.com/v1",)
GATEWAY = ("gateway.networking.k8s.io/v1", "gateway.networking.k8s.io/v1/HTTPRoute")
APIS: tuple[tuple[str, ...], ...] = ((), MONITORING, GATEWAY, MONITORING + GATEWAY)
RELEASE, NAMESPACE = "nightly", "team-a"

SPEC = yaml.safe_load((Path(__file__).parents[2] / "pipelines" / "specs" / "smart_home.yaml").read_text(encoding="utf-8"))
STORE = {"url": "s3://bucket/slipway", "existingSecret": "slipway-store"}
TRACKING = {"uri": "https://mlflow.example.com", "existingSecret": "slipway-mlflow"}
PARENTS = [{"name": "public", "namespace": "gateways", "sectionName": "https"}]
JOB = {"enabled": True, "name": "slipway-train-0123456789abcdef", "job": "staging/train-0123456789abcdef/config.json"}
DIGEST = "ab" * 32
ALL_PROFILES = ("cpu", "gpu", "laptop", "production")


@dataclass(frozen=True)
class Case:
    """Values that a user would give, over those of each profile."""

    chart: Chart
    name: str
    values: Mapping[str, Any]
    apis: tuple[str, ...] = ()
    """What the cluster must know for it."""
    only: tuple[str, ...] = ()
    """The profiles that it is for; all, and none, where empty."""
    later: Mapping[str, Any] | None = None
    """Values over these by which a program of the release renders further objects."""


@dataclass(frozen=True)
class Rendering:
    """One rendering of the matrix."""

    case: Case
    profile: str | None
    kube_version: str
    api_versions: tuple[str, ...]

    def __str__(self) -> str:
        apis = "+".join(sorted({api.partition(".")[0] for api in self.api_versions})) or "no more APIs"
        return f"{self.case.chart} {self.profile or 'by default'}, {self.case.name}, Kubernetes {self.kube_version}, {apis}"


def over(base: Mapping[str, Any], *others: Mapping[str, Any]) -> dict[str, Any]:
    """Values over values, as Helm lays them: mappings merge, all else is replaced."""
    result = dict(base)
    for other in others:
        for key, value in other.items():
            old = result.get(key)
            result[key] = over(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return result


SERVED = {"store": STORE, "config": {"model_name": "lamp", "model": {"digest": DIGEST}}}
UNSIGNED = {"config": {"serve": {"allow_unsigned": ["lamp"]}}}
WATCHED = {"monitoring": {part: {"enabled": True} for part in ("gateways", "ray", "rules", "dashboard")}}
PIPELINE = {"tracking": TRACKING, "config": SPEC, "pipeline": {"enabled": True}}
SCHEDULE = {"pipeline": {"enabled": False, "schedule": "17 3 * * 1"}, "monitor": {"enabled": True}}
STEP = {"pipeline": {"enabled": False, "schedule": ""}, "rayJob": {**JOB, "numWorkers": 2}}
ELSEWHERE = ("", "cpu", "gpu", "production")  # a laptop's store is a volume of its own
DATABASE = {
    "database": {"existingSecret": "mlflow-database"},
    "artifacts": {"destination": "s3://bucket/mlflow", "existingSecret": "mlflow-s3"},
}
UPGRADE = {"autoscaler": {"enabled": True}, "upgrade": {"type": "NewClusterWithIncrementalUpgrade", "gatewayClassName": "istio"}}
POOLS = {
    "workerGroups": {"gpu": {"enabled": True, "runtimeClassName": "nvidia"}},
    "config": {
        "adapters": {"red": {"type": "store", "digest": DIGEST}},
        "pool_models": {"gpu": {"type": "path", "path": "/models/lamp"}},
        "serve": {
            "pools": [
                {"name": "cpu", "usd_per_hour": 0.1, "cpus_per_replica": 2},
                {"name": "gpu", "accelerator": "gpu", "engine": "vllm", "usd_per_hour": 1.5, "cpus_per_replica": 4},
            ]
        },
    },
}
GUARDED = {
    "apiKeys": {"existingSecret": "keys"},
    "trustedKeys": {"pem": "-----BEGIN PUBLIC KEY-----\nMCowBQYDK2VwAyEA\n-----END PUBLIC KEY-----\n"},
    "config": {
        "serve": {
            "api_keys_file": "/etc/slipway/api-keys/api_keys.json",
            "trusted_keys_file": "/etc/slipway/trusted/trusted.pem",
        }
    },
}
MOUNTED = {"volumes": [{"existingClaim": "models", "path": "/models"}]}
ASLEEP = {
    "rayToken": False,
    "gateway": {"autoscaling": {"enabled": True}, "service": {"type": "LoadBalancer"}},
    "networkPolicy": {"egress": [{"to": [{"ipBlock": {"cidr": "10.0.0.0/8"}}]}]},
    "config": {"serve": {"num_replicas": 1, "autoscale": {"min_replicas": 0, "max_replicas": 1}}},
}
INGRESS = {"ingress": {"enabled": True, "host": "mlflow.example.com", "tlsSecret": "mlflow-tls"}}

WITH_ALL = {
    "env": [{"name": "HF_HOME", "value": "/cache"}, {"name": "HF_TOKEN", "secret": {"name": "hub", "key": "token"}}],
    "volumes": [{"existingClaim": "datasets", "path": "/data"}, {"existingClaim": "hub-cache", "path": "/cache", "readOnly": False}],
    "home": {"enabled": True},
    "signing": {"existingSecret": "slipway-signing"},
    "imagePullSecrets": ["registry"],
    "labels": {"team": "a"},
    "security": {"setIds": False},
    "networkPolicy": {"egress": [{"to": [{"ipBlock": {"cidr": "10.0.0.0/8"}}]}]},
}

CASES: tuple[Case, ...] = (
    Case("training", "pipeline", over(PIPELINE, {"store": STORE}), only=ELSEWHERE, later=STEP),
    Case("training", "pipeline on a volume", PIPELINE, only=("laptop",), later=STEP),
    Case("training", "schedule and monitor", over(PIPELINE, SCHEDULE, {"store": STORE}), only=ELSEWHERE, later=STEP),
    Case("training", "one process", {"rayJob": JOB}, only=("laptop",)),
    Case("training", "workers", {"store": STORE, "rayJob": {**JOB, "numWorkers": [2, 8], "queueName": "team-a"}}, only=ELSEWHERE),
    Case("training", "elastic", over(PIPELINE, WITH_ALL, {"store": STORE, "rayJob": {**JOB, "numWorkers": [2, 8]}}), only=ELSEWHERE),
    Case(
        "training",
        "all at once",
        over(PIPELINE, {"store": STORE, "rayJob": {**JOB, "numWorkers": 2, "submissionMode": "HTTPMode"}}),
        only=("gpu",),
    ),
    Case("serving", "model", over(SERVED, UNSIGNED), only=("", "cpu", "gpu", "laptop")),
    Case("serving", "signed model", SERVED, only=("production",)),
    Case("serving", "watched", over(SERVED, UNSIGNED, WATCHED), only=("", "cpu", "gpu")),
    Case("serving", "route", over(SERVED, UNSIGNED, {"route": {"enabled": True, "parentRefs": PARENTS}}), apis=GATEWAY, only=("", "gpu")),
    Case("serving", "pools, adapters, keys and trust", over(SERVED, POOLS, GUARDED, MOUNTED), only=("", "cpu")),
    Case("serving", "asleep, own network, gateways that follow the load", over(SERVED, UNSIGNED, ASLEEP), only=("", "laptop")),
    Case("serving", "incremental upgrade", over(SERVED, UNSIGNED, UPGRADE), apis=GATEWAY, only=("cpu", "gpu")),
    Case("tracking", "volume", {}, only=("", "laptop")),
    Case("tracking", "database", DATABASE, only=("", "cpu", "gpu", "production")),
    Case("tracking", "ingress", over(DATABASE, INGRESS), only=("", "production")),
    Case("tracking", "route", over(DATABASE, {"route": {"enabled": True, "parentRefs": PARENTS}}), apis=GATEWAY, only=("",)),
)


def renderings(cases: Sequence[Case] = CASES) -> Iterator[Rendering]:
    """The whole matrix: cases times profiles times versions of Kubernetes times further APIs."""
    for case in cases:
        for profile in profiles_of(case):
            for kube_version in KUBE_VERSIONS:
                yield from (Rendering(case, profile, kube_version, apis) for apis in APIS if set(case.apis) <= set(apis))


def profiles_of(case: Case) -> list[str | None]:
    """The profiles of a case; None is the chart by itself."""
    found = [None, *profiles(case.chart)]
    return [profile for profile in found if not case.only or (profile or "") in case.only]
