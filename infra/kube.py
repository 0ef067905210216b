"""The parts of Kubernetes that the charts' values share.

- A chart's values have two zones: Kubernetes' own words in camelCase, and `config`, the Python model verbatim.
- These models are the only source: values.yaml, values.schema.json and the table in each README are written from them.
- What keeps a pod restricted (no root, no privilege, read-only root) is not a value: the templates always set it.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, ConfigDict, Field, model_validator
from pydantic.alias_generators import to_camel

from infra.config import Config

_PART = "[a-z0-9]([-a-z0-9]*[a-z0-9])?"
NAME_PATTERN = f"^{_PART}$"
DOTTED_NAME_PATTERN = rf"^{_PART}(\.{_PART})*$"
OPTIONAL_NAME_PATTERN = rf"^({_PART}(\.{_PART})*)?$"
HOST_PATTERN = rf"^(\*\.)?{_PART}(\.{_PART})*$"
OPTIONAL_HOST_PATTERN = rf"^((\*\.)?{_PART}(\.{_PART})*)?$"
LABEL_PATTERN = r"^([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?$"
KEY_PATTERN = rf"^({_PART}(\.{_PART})*/)?[A-Za-z0-9]([-A-Za-z0-9_.]{{0,61}}[A-Za-z0-9])?$"
QUANTITY_PATTERN = r"^([0-9]+(\.[0-9]+)?|\.[0-9]+)(m|k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei|[eE][+-]?[0-9]+)?$"
STORE_PATTERN = r"^[a-z][a-z0-9+.-]*://[A-Za-z0-9._~%/:@-]+$"
OUR_LABELS_PATTERN = r"^(app\.kubernetes\.io|slipway\.dev)/"
_FACTORS = {"m": 1e-3, "": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18} | {
    f"{letter}i": 1024.0**power for power, letter in enumerate("KMGTPE", start=1)
}

Quantity = Annotated[str, Field(pattern=QUANTITY_PATTERN)] | Annotated[int, Field(ge=0)] | Annotated[float, Field(ge=0)]
Key = Annotated[str, Field(pattern=KEY_PATTERN)]
Labels = dict[Key, Annotated[str, Field(max_length=63, pattern=LABEL_PATTERN)]]
Annotations = dict[Key, str]
Name = Annotated[str, Field(max_length=63, pattern=NAME_PATTERN)]
OptionalName = Annotated[str, Field(max_length=253, pattern=OPTIONAL_NAME_PATTERN)]


class KubeModel(Config):
    """Base of the Kubernetes zone: camelCase in YAML, snake_case here."""

    model_config = ConfigDict(alias_generator=to_camel, validate_by_name=True, validate_by_alias=True, serialize_by_alias=True)


def amount(quantity: str | int | float) -> float:
    """A quantity as a number in its base unit: cores, or bytes.

    Raises ValueError on text that is no quantity.
    """
    if not isinstance(quantity, str):
        return float(quantity)
    found = re.fullmatch(r"([0-9.]+)(m|[kMGTPE]|[KMGTPE]i|)", quantity)
    return float(found[1]) * _FACTORS[found[2]] if found else float(quantity)


def _not_latest(tag: str) -> str:
    if tag == "latest":
        raise ValueError("'latest' names another image tomorrow. Give a version, or a digest.")
    return tag


def _not_ours(labels: Labels) -> Labels:
    for name in labels:
        if re.match(OUR_LABELS_PATTERN, name):
            raise ValueError(f"label {name!r} is set by the chart itself. Take another name, or `nameOverride`, `deployment`, `managedBy`.")
    return labels


def _and_not_ours(schema: dict[str, Any]) -> None:
    """JSON Schema asks every pattern that a key has, so ours need no expression that leaves them out."""
    schema["patternProperties"] = {**schema["patternProperties"], OUR_LABELS_PATTERN: False}


class Image(KubeModel):
    """A container image."""

    repository: str = Field(min_length=1, pattern=r"^[a-z0-9][a-z0-9._/:-]*$")
    """Registry and name, without a tag."""
    tag: Annotated[str, AfterValidator(_not_latest)] = Field(
        "", max_length=128, pattern=r"^([A-Za-z0-9_][A-Za-z0-9._-]*)?$", json_schema_extra={"not": {"const": "latest"}}
    )
    """Version; empty means the chart's appVersion. `latest` is refused."""
    digest: str = Field("", pattern=r"^(sha256:[0-9a-f]{64})?$")
    """`sha256:...` of the image, which then counts instead of the tag."""
    pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    """When a node asks the registry."""


class Resources(KubeModel):
    """What a container asks for and may use; `nvidia.com/gpu` and the like are named under `limits`."""

    requests: dict[str, Quantity] = Field(default_factory=dict)
    """Kept free for it on its node, such as `cpu: 500m`."""
    limits: dict[str, Quantity] = Field(default_factory=dict)
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
    value: Annotated[str, Field(max_length=63, pattern=LABEL_PATTERN)] | None = None
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

    name: Annotated[str, Field(max_length=253, pattern=DOTTED_NAME_PATTERN)]
    """Name of the Secret."""
    key: str = Field(min_length=1, max_length=253, pattern=r"^[-._a-zA-Z0-9]+$")
    """Key in it."""


class EnvVar(KubeModel):
    """An environment variable: a plain value, or a key of a Secret."""

    name: str = Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
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
    labels: Labels = Field(default_factory=dict)
    """What the cluster's Prometheus selects by."""
    namespace: Name = "monitoring"
    """Where that Prometheus runs; the NetworkPolicy lets it in."""


class ArtifactStore(KubeModel):
    """Where artifacts travel between driver, jobs and servers (`SLIPWAY_STORE`)."""

    url: str = Field("", pattern=f"{STORE_PATTERN}|^$")
    """fsspec URL, such as `s3://bucket/slipway`, or `file:///mnt/store` with `existingClaim`."""
    existing_secret: OptionalName = ""
    """Secret whose keys become environment variables, such as AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL."""
    existing_claim: OptionalName = ""
    """PersistentVolumeClaim, shared by all nodes, that is mounted at a `file://` URL's path."""

    @model_validator(mode="after")
    def _volume_has_a_path(self) -> Self:
        if self.url.startswith("file:") != bool(self.existing_claim):
            raise ValueError(
                f"url {self.url!r} with existingClaim {self.existing_claim!r}: a file:///PATH needs a shared volume, others none."
            )
        return self


class Tracking(KubeModel):
    """The MLflow server."""

    uri: str = Field("", pattern=r"^(https?://[A-Za-z0-9._:/-]+)?$")
    """Its address; it may hold no password."""
    existing_secret: OptionalName = ""
    """Secret whose keys become environment variables, such as MLFLOW_TRACKING_TOKEN."""


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
    managed_by: Annotated[str, Field(max_length=63, pattern=LABEL_PATTERN)] = ""
    """Label `app.kubernetes.io/managed-by`; empty means Helm. `slipway deploy` writes itself."""
    labels: Annotated[Labels, AfterValidator(_not_ours)] = Field(default_factory=dict, json_schema_extra=_and_not_ours)
    """More labels for every object; those that begin with `app.kubernetes.io/` or `slipway.dev/` are ours."""
    annotations: Annotations = Field(default_factory=dict)
    """Annotations for every pod."""
    image_pull_secrets: list[Name] = Field(default_factory=list)
    """Names of Secrets for private registries."""
    security: Security = Security()
    service_account: ServiceAccount = ServiceAccount()
    network_policy: NetworkPolicy = NetworkPolicy()
    env: list[EnvVar] = Field(default_factory=list)
    """More environment variables for every container."""
