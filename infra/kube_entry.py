"""How clients get to a chart's pods: Service, Ingress, and the Gateway API's route."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from infra.kube import KubeModel
from infra.kube_types import OPTIONAL_HOST_PATTERN, Annotations, DottedName, HostName, OptionalName


class Service(KubeModel):
    """The Service that clients use."""

    type: Literal["ClusterIP", "NodePort", "LoadBalancer"] = "ClusterIP"
    """Kubernetes' own."""
    port: int = Field(80, ge=1, le=65535)
    """Its port."""
    annotations: Annotations = Field(default_factory=dict)
    """Such as those that a cloud's load balancer reads."""


class Ingress(KubeModel):
    """Ingress with TLS in front of the Service."""

    enabled: bool = False
    """Whether there is one."""
    class_name: OptionalName = ""
    """IngressClass; empty means the cluster's default."""
    host: Annotated[str, Field(max_length=253, pattern=OPTIONAL_HOST_PATTERN)] = ""
    """Name that clients use."""
    tls_secret: OptionalName = ""
    """Secret of type kubernetes.io/tls. Empty means no TLS, which is refused unless `allowPlainHttp` says so."""
    allow_plain_http: bool = False
    """Whether keys and data may pass in the clear."""
    annotations: Annotations = Field(default_factory=dict)
    """Such as `cert-manager.io/cluster-issuer`, and the controller's limits of size, time and buffering."""


class ParentRef(KubeModel):
    """A Gateway of the Gateway API that takes the route; TLS is its listener's."""

    name: DottedName
    """Its name."""
    namespace: Annotated[str, Field(max_length=63, pattern=r"^([a-z0-9]([-a-z0-9]*[a-z0-9])?)?$")] = ""
    """Where it is; empty means the release's namespace."""
    section_name: OptionalName = ""
    """Listener, such as `https`; empty means all."""


class Route(KubeModel):
    """HTTPRoute to the Service; an error where the cluster does not know the kind."""

    enabled: bool = False
    """Whether there is one."""
    parent_refs: list[ParentRef] = Field(default_factory=list)
    """Gateways that take it."""
    hostnames: list[HostName] = Field(default_factory=list)
    """Names that clients use; none means all of the listener's."""
    annotations: Annotations = Field(default_factory=dict)
    """Of the route."""
