"""The values of the chart helm/serving: Kubernetes' part, and under `config` what serving itself is told."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from infra.kube import (
    ChartValues,
    Disruption,
    Image,
    KubeModel,
    Monitor,
    Probe,
    RayNetworkPolicy,
    ReplicaBounds,
    Resources,
    Scheduling,
    SecretKey,
    Toleration,
)
from infra.kube_entry import Ingress, Route, Service
from infra.kube_stores import ArtifactStore, Tracking
from infra.kube_types import NAME_PATTERN, MoreLabels, Name, OptionalName, Quantity
from infra.kube_volumes import MountedClaim
from serving.cluster_config import ClusterConfig, StoreSource
from serving.config import ServeConfig

GroupName = Annotated[str, Field(max_length=20, pattern=NAME_PATTERN)]
NO_DIGEST = "0" * 64
"""Stands in the chart's own values for a model that nobody has named yet; the templates refuse it."""


class RayPod(Scheduling):
    """A pod of Ray."""

    resources: Resources = Resources()
    """Of its container. Ray counts `limits.cpu`, or else `requests.cpu`; GPUs are under `limits`, such as `nvidia.com/gpu: 1`."""


class WorkerGroup(RayPod, ReplicaBounds):
    """Pods of one kind, in which replicas run."""

    enabled: bool = True
    """Whether there is such a group."""
    accelerator: Literal["cpu", "gpu"] = "cpu"
    """Which replicas run here, and in which image: those with `gpus_per_replica: 0`, or those with 1."""
    home: Quantity = "20Gi"
    """Disk of each pod for the models that it fetches and for logs."""


class Autoscaler(KubeModel):
    """Ray's autoscaler: pods for replicas that find no room, between the bounds of their group."""

    enabled: bool = False
    """Whether it runs, beside Ray's head. Needed where a group's bounds differ, and for the incremental upgrade."""
    idle_timeout_seconds: int = Field(300, ge=1)
    """How long a pod without a replica stays."""
    upscaling_mode: Literal["Default", "Aggressive", "Conservative"] = "Default"
    """How many pods are asked for at once."""
    resources: Resources = Resources(requests={"cpu": "200m", "memory": "512Mi"}, limits={"cpu": 1, "memory": "1Gi"})
    """Of its container."""


class Upgrade(KubeModel):
    """What happens when the Ray cluster itself must change: another image, other resources. A new `config` never needs it."""

    type: Literal["NewCluster", "NewClusterWithIncrementalUpgrade", "None"] = "NewCluster"
    """`NewCluster` starts a second cluster whole and then ends the first, which takes twice the nodes; the incremental one moves capacity
    by steps, where KubeRay offers it and a Gateway API is there; `None` changes nothing while the cluster runs."""
    gateway_class_name: str = Field("", pattern=r"^([a-z0-9]([-a-z0-9.]*[a-z0-9])?)?$")
    """GatewayClass of the incremental upgrade, which KubeRay needs for its own route; clients go on to our gateways."""
    step_size_percent: int = Field(25, ge=1, le=100)
    """Capacity moved in one step."""
    interval_seconds: int = Field(30, ge=1)
    """Time between steps."""
    max_surge_percent: int = Field(25, ge=0, le=100)
    """Capacity beyond the whole that both clusters may have together."""
    deletion_delay_seconds: int = Field(120, ge=0)
    """How long the old cluster stays when the new one has taken over."""


class GatewayScaling(ReplicaBounds):
    """HorizontalPodAutoscaler of the gateways."""

    enabled: bool = False
    """Whether there is one; `gateway.replicas` is then not read."""
    min_replicas: int = Field(2, ge=1, le=100)
    """Fewest pods."""
    max_replicas: int = Field(6, ge=1, le=100)
    """Most pods."""
    target_cpu_percent: int = Field(70, ge=1, le=100)
    """Mean use of the requested CPU above which there are more."""


class Gateway(Scheduling):
    """The pods that clients are connected to; each knows every replica."""

    replicas: int = Field(2, ge=1, le=100)
    """How many; fewer than two means no answer while one is exchanged."""
    resources: Resources = Resources(requests={"cpu": "500m", "memory": "256Mi"}, limits={"memory": "512Mi"})
    """Of its container."""
    autoscaling: GatewayScaling = GatewayScaling()
    service: Service = Service()
    disruption: Disruption = Disruption()
    token_secret: SecretKey = SecretKey(name="slipway-front", key="token")
    """Secret that gateways and replicas know each other by, at least 32 characters, made beforehand: `openssl rand -hex 32`."""
    readiness: Probe = Probe(period_seconds=2, timeout_seconds=3, failure_threshold=2)
    """Times of the probe of `/health`, by which a gateway gets requests once it knows a replica."""
    startup: Probe = Probe(period_seconds=1, timeout_seconds=2, failure_threshold=60)
    """Times of the probe of its port, until which it counts as starting."""


class Rules(KubeModel):
    """PrometheusRule: alerts on what clients notice."""

    enabled: bool = False
    """Whether there is one; left out where the cluster does not know the kind."""
    labels: MoreLabels = Field(default_factory=dict)
    """What the cluster's Prometheus selects by."""
    ttft_seconds: float = Field(2.0, gt=0)
    """Time to the first token that 99 of 100 requests should keep."""
    error_percent: float = Field(1.0, gt=0, lt=100)
    """Share of requests answered by 5xx or refused, above which it is an error."""
    hold_minutes: int = Field(5, ge=1)
    """How long it must be so."""


class Dashboard(KubeModel):
    """ConfigMap with the Grafana dashboard, for Grafana's sidecar."""

    enabled: bool = False
    """Whether there is one."""
    labels: MoreLabels = Field(default_factory=lambda: {"grafana_dashboard": "1"})
    """What the sidecar selects by."""


class Monitoring(KubeModel):
    """What Prometheus and Grafana are told."""

    gateways: Monitor = Monitor()
    """ServiceMonitor of the gateways, which tell of all replicas, each once."""
    ray: Monitor = Monitor()
    """PodMonitor of Ray's own figures."""
    rules: Rules = Rules()
    dashboard: Dashboard = Dashboard()
    namespace: Name = "monitoring"
    """Where Prometheus runs; the NetworkPolicy lets it in."""


class ApiKeys(KubeModel):
    """The file that `slipway keys` writes, from a Secret; it is mounted as /etc/slipway/api-keys/api_keys.json."""

    existing_secret: OptionalName = ""
    """Name of the Secret. With it, set `config.serve.api_keys_file` to that path."""
    key: str = Field("api_keys.json", pattern=r"^[-._a-zA-Z0-9]+$")
    """Its key."""


class TrustedKeys(KubeModel):
    """Public keys whose signatures count, mounted as /etc/slipway/trusted/trusted.pem."""

    pem: str = ""
    """The keys themselves (`.slipway/keys/signing.pub`), one after the other; they are no secret."""
    existing_config_map: OptionalName = ""
    """In their place a ConfigMap that has them as `trusted.pem`."""


class Values(ChartValues):
    """The values of helm/serving."""

    cpu_image: Image = Image(repository="slipway-serve-cpu")
    """Image of gateways, of Ray's head and of groups with `accelerator: cpu`."""
    gpu_image: Image = Image(repository="slipway-serve-gpu")
    """Image of groups with `accelerator: gpu`; Ray and Python must be the same as in the other."""
    store: ArtifactStore = ArtifactStore()
    tracking: Tracking = Tracking()
    network_policy: RayNetworkPolicy = RayNetworkPolicy()
    volumes: list[MountedClaim] = Field(default_factory=list)
    """Volumes mounted where replicas run, for models with `type: path`."""
    head: RayPod = RayPod(resources=Resources(requests={"cpu": 1, "memory": "3Gi"}, limits={"cpu": 2, "memory": "3Gi"}))
    """Ray's head: it starts and watches replicas, and holds none."""
    worker_groups: dict[GroupName, WorkerGroup] = Field(
        default_factory=lambda: {
            "cpu": WorkerGroup(resources=Resources(requests={"cpu": 4, "memory": "6Gi"}, limits={"cpu": 4, "memory": "6Gi"})),
            "gpu": WorkerGroup(
                enabled=False,
                accelerator="gpu",
                resources=Resources(requests={"cpu": 4, "memory": "24Gi"}, limits={"cpu": 4, "memory": "24Gi", "nvidia.com/gpu": 1}),
                tolerations=[Toleration(key="nvidia.com/gpu", operator="Exists", effect="NoSchedule")],
            ),
        }
    )
    """Pods in which replicas run, by the name of their group."""
    worker_disruption: Disruption = Disruption()
    """Of all workers together; each finishes its answers before it goes (`config.serve.drain_timeout_s`)."""
    autoscaler: Autoscaler = Autoscaler()
    upgrade: Upgrade = Upgrade()
    ray_token: bool = True
    """Whether Ray asks for a token, which KubeRay makes, before it lets anyone run code or see its dashboard."""
    gateway: Gateway = Gateway()
    ingress: Ingress = Ingress()
    route: Route = Route()
    monitoring: Monitoring = Monitoring()
    api_keys: ApiKeys = ApiKeys()
    trusted_keys: TrustedKeys = TrustedKeys()
    config: ClusterConfig = ClusterConfig(
        model_name="model",
        model=StoreSource(digest=NO_DIGEST),
        serve=ServeConfig(host="0.0.0.0", cpus_per_replica=4, drain_timeout_s=120),
    )
    """What serving is told, as the Python model has it; the digest of zeros stands for no model yet."""
