"""The parts of Kubernetes that the charts' values share.

- A chart's values have two zones: Kubernetes' own words in camelCase, and `config`, the Python model verbatim.
- These models are the only source: values.yaml, values.schema.json and the table in each README are written from them.
- What keeps a pod restricted (no root, no privilege, read-only root) is not a value: the templates always set it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, ConfigDict, Field, model_validator
from pydantic.alias_generators import to_camel

from infra.config import Config
from infra.kube_types import (
    OPTIONAL_NAME_PATTERN,
    Annotations,
    DottedName,
    Key,
    Labels,
    LabelValue,
    MoreLabels,
    Name,
    OptionalName,
    Quantities,
    SecretKeyName,
    amount,
)

OUR_VARIABLES = (
    "DO_NOT_TRACK",
    "HF_HUB_OFFLINE",
    "HOME",
    "MLFLOW_AUTH_ADMIN_PASSWORD",
    "MLFLOW_AUTH_ADMIN_USERNAME",
    "MLFLOW_AUTH_CONFIG_PATH",
    "MLFLOW_BACKEND_STORE_URI",
    "MLFLOW_DISABLE_TELEMETRY",
    "MLFLOW_FLASK_SERVER_SECRET_KEY",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION",
    "MLFLOW_TRACKING_URI",
    "PYTHONUNBUFFERED",
    "RAY_USAGE_STATS_ENABLED",
    "RAY_gcs_rpc_server_reconnect_timeout_s",
    "SLIPWAY_FRONT_TOKEN_FILE",
    "SLIPWAY_GATEWAYS",
    "SLIPWAY_HOME",
    "SLIPWAY_KUBERNETES_VALUES",
    "SLIPWAY_SIGNING_KEY",
    "SLIPWAY_STORE",
    "SLIPWAY_WAKE_URL",
    "TOKENIZERS_PARALLELISM",
)
"""Environment variables that the templates set; a container may have each once."""


class KubeModel(Config):
    """Base of the Kubernetes zone: camelCase in YAML, snake_case here."""

    model_config = ConfigDict(alias_generator=to_camel, validate_by_name=True, validate_by_alias=True, serialize_by_alias=True)


def _not_latest(tag: str) -> str:
    if tag == "latest":
        raise ValueError("'latest' names another image tomorrow. Give a version, or a digest.")
    return tag


def _no_twins(variables: list[EnvVar]) -> list[EnvVar]:
    names = [each.name for each in variables]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{name} is given {names.count(name)} times. Give it once.")
        if name in OUR_VARIABLES:
            raise ValueError(f"{name} is set by the chart itself. Its other values say what it is.")
    return variables


class Image(KubeModel):
    """A container image."""

    repository: str = Field(min_length=1, pattern=r"^[a-z0-9][a-z0-9._/:-]*$")
    """Registry and name, without a tag."""
    tag: Annotated[str, AfterValidator(_not_latest)] = Field(
        "", max_length=128, pattern=r"^[A-Za-z0-9._-]*$", json_schema_extra={"not": {"const": "latest"}}
    )
    """Version; empty means the chart's appVersion. `latest` is refused."""
    digest: str = Field("", pattern=r"^(sha256:[0-9a-f]{64})?$")
    """`sha256:...` of the image, which then counts instead of the tag."""
    pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    """When a node asks the registry."""


class Resources(KubeModel):
    """What a container asks for and may use; `nvidia.com/gpu` and the like are named under `limits`."""

    requests: Quantities = Field(default_factory=dict)
    """Kept free for it on its node, such as `cpu: 500m`."""
    limits: Quantities = Field(default_factory=dict)
    """The most it may use; more memory ends it, more CPU slows it."""

    @model_validator(mode="after")
    def _requests_fit_limits(self) -> Self:
        for name, asked in self.requests.items():
            limit = self.limits.get(name)
            if limit is not None and amount(asked) > amount(limit):
                raise ValueError(f"requests.{name} {asked!r} is more than limits.{name} {limit!r}. Raise the limit.")
        return self


class Toleration(KubeModel):
    """A taint that a pod puts up with."""

    key: Key | None = None
    """Name of the taint; absent means every taint, with `Exists`."""
    operator: Literal["Exists", "Equal"] = "Equal"
    """Whether the value must be equal too."""
    value: LabelValue | None = None
    """Value of the taint."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """Effect of the taint; absent means every effect."""
    toleration_seconds: int | None = Field(None, ge=0)
    """How long a `NoExecute` is put up with; absent means for ever."""

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if self.operator == "Exists" and self.value:
            raise ValueError(f"value {self.value!r} beside the operator Exists, which asks for none. Leave it out, or take Equal.")
        if self.operator == "Equal" and not self.key:
            raise ValueError("key is absent, which is for the operator Exists alone. Name the taint.")
        if self.toleration_seconds is not None and self.effect != "NoExecute":
            raise ValueError(f"tolerationSeconds is for the effect NoExecute, found {self.effect}. Leave it out.")
        return self


class Scheduling(KubeModel):
    """On which nodes pods run."""

    node_selector: Labels = Field(default_factory=dict)
    """Labels that a node must have."""
    tolerations: list[Toleration] = Field(default_factory=list)
    """Taints that are put up with, such as those of GPU or spot nodes."""
    affinity: dict[str, Any] = Field(default_factory=dict)
    """Kubernetes' own `affinity`, passed on as it is."""
    topology_spread_constraints: list[dict[str, Any]] = Field(default_factory=list)
    """Kubernetes' own, passed on as they are."""
    priority_class_name: OptionalName = ""
    """Who gives way when nodes are full; empty means the cluster's default."""
    runtime_class_name: OptionalName = ""
    """Container runtime, such as `nvidia`; empty means the cluster's default."""


class SecretKey(KubeModel):
    """One key of a Secret that exists already."""

    name: DottedName
    """Name of the Secret."""
    key: SecretKeyName
    """Key in it."""


class EnvVar(KubeModel):
    """An environment variable: a plain value, or a key of a Secret."""

    name: str = Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", json_schema_extra={"not": {"enum": list(OUR_VARIABLES)}})
    """Name of the variable."""
    value: str | None = None
    """A plain value, for all to see."""
    secret: SecretKey | None = None
    """Where a value must not be seen."""

    @model_validator(mode="after")
    def _has_one_source(self) -> Self:
        if (self.value is None) == (self.secret is None):
            raise ValueError(f"{self.name}: give `value` or `secret`, one of them.")
        return self


class Security(KubeModel):
    """User and group of all pods. All else is fixed: not root, no privilege, no capability, read-only root, the runtime's seccomp."""

    set_ids: bool = True
    """Whether user and groups are written into the pods; `false` where the cluster gives them, as OpenShift does."""
    run_as_user: int = Field(10001, ge=1)
    """User id; the images have this one."""
    run_as_group: int = Field(10001, ge=1)
    """Group id."""
    fs_group: int = Field(10001, ge=1)
    """Group that owns volumes."""


class ServiceAccount(KubeModel):
    """The identity of pods."""

    create: bool = True
    """Whether the chart makes it; `false` takes one that exists already."""
    name: OptionalName = ""
    """Empty means a name made from the release."""
    annotations: Annotations = Field(default_factory=dict)
    """Such as the role of a cloud's workload identity."""


class NetworkPolicy(KubeModel):
    """Who may open connections to the pods, and where they may go."""

    enabled: bool = True
    """Whether there is one. Needs a network that heeds it."""
    extra_ingress: list[dict[str, Any]] = Field(default_factory=list)
    """Kubernetes' own ingress rules, added to ours."""
    egress: list[dict[str, Any]] = Field(default_factory=list)
    """Kubernetes' own egress rules. Empty leaves the way out open; otherwise only these, DNS and the release's own pods are reached."""


class RayNetworkPolicy(NetworkPolicy):
    """The same, for pods of Ray."""

    operator_namespace: Name = "kuberay-system"
    """Where the KubeRay operator runs; it asks Ray's head how things go."""


class ReplicaBounds(KubeModel):
    """Between how many pods a number may move."""

    min_replicas: int = Field(1, ge=0, le=4096)
    """The fewest."""
    max_replicas: int = Field(1, ge=1, le=4096)
    """The most."""

    @model_validator(mode="after")
    def _bounds_are_ordered(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"minReplicas {self.min_replicas} is above maxReplicas {self.max_replicas}. Lower it.")
        return self


class Disruption(KubeModel):
    """PodDisruptionBudget: how many pods may be taken away at once when nodes are drained."""

    enabled: bool = True
    """Whether there is one."""
    max_unavailable: int = Field(1, ge=1)
    """So many at most."""


class Probe(KubeModel):
    """Times of a probe."""

    initial_delay_seconds: int = Field(0, ge=0)
    """From the start of the container to the first one."""
    period_seconds: int = Field(10, ge=1)
    """From one to the next."""
    timeout_seconds: int = Field(5, ge=1)
    """How long an answer may take."""
    failure_threshold: int = Field(3, ge=1)
    """Failures in a row that count."""


class Monitor(KubeModel):
    """A ServiceMonitor or PodMonitor of the Prometheus operator; left out where the cluster does not know the kind."""

    enabled: bool = False
    """Whether there is one."""
    interval: str = Field("30s", pattern=r"^[0-9]+(ms|s|m)$")
    """How often Prometheus reads."""
    labels: MoreLabels = Field(default_factory=dict)
    """What the cluster's Prometheus selects by."""
    namespace: Name = "monitoring"
    """Where that Prometheus runs; the NetworkPolicy lets it in."""


class ChartValues(KubeModel):
    """What the values of every chart have."""

    enabled: bool = True
    """Read only where this chart is a part of another, as its condition."""
    global_: dict[str, Any] = Field(default_factory=dict, alias="global")
    """Helm's own, for charts that have this one as a part; not read."""
    name_override: Annotated[str, Field(max_length=40, pattern=r"^([a-z0-9]([-a-z0-9]*[a-z0-9])?)?$")] = ""
    """In place of the chart's name, in the label `app.kubernetes.io/name`."""
    fullname_override: Annotated[str, Field(max_length=40, pattern=r"^([a-z]([-a-z0-9]*[a-z0-9])?)?$")] = ""
    """In place of the release's name, with which the name of every object begins; at most 40 characters."""
    deployment: Annotated[str, Field(max_length=63, pattern=OPTIONAL_NAME_PATTERN)] = ""
    """Label `slipway.dev/deployment` of every object; empty means the release's name."""
    managed_by: LabelValue = ""
    """Label `app.kubernetes.io/managed-by`; empty means Helm. `slipway deploy` writes itself."""
    labels: MoreLabels = Field(default_factory=dict)
    """More labels for every object; those of `app.kubernetes.io/`, `slipway.dev/`, `ray.io/` and Kueue are ours."""
    annotations: Annotations = Field(default_factory=dict)
    """Annotations for every pod."""
    image_pull_secrets: list[DottedName] = Field(default_factory=list)
    """Names of Secrets for private registries."""
    security: Security = Security()
    service_account: ServiceAccount = ServiceAccount()
    network_policy: NetworkPolicy = NetworkPolicy()
    env: Annotated[list[EnvVar], AfterValidator(_no_twins)] = Field(default_factory=list)
    """More environment variables for every container."""
