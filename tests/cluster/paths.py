"""What a request asks for, as far as its path and query say: read before anything is looked up, as an API server does.

Source: k8s.io/apiserver, pkg/endpoints/request/requestinfo.go.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tests.cluster.selectors import name_in

VERBS = {"GET": "get", "POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}
OF_MANY = {"get": "list", "delete": "deletecollection"}
TRUE = ("true", "1")


@dataclass(frozen=True)
class Asked:
    """The parts of a path such as `/apis/GROUP/VERSION/namespaces/NS/PLURAL/NAME/SUBRESOURCE`."""

    group: str
    version: str
    namespace: str
    plural: str
    name: str
    subresource: str


def asked_for(path: str) -> Asked | None:
    """The parts of a path; None where it names no resource."""
    parts = [part for part in path.split("/") if part]
    if parts[:1] == ["api"]:
        group, version, rest = "", parts[1] if len(parts) > 1 else "", parts[2:]
    else:
        group, version, rest = (parts[1], parts[2], parts[3:]) if len(parts) > 2 and parts[0] == "apis" else ("", "", [])
    namespace = ""
    if len(rest) > 2 and rest[0] == "namespaces" and rest[2] not in ("status", "finalize"):
        namespace, rest = rest[1], rest[2:]
    if not rest or len(rest) > 3:
        return None
    plural, name, subresource = [*rest, "", ""][:3]
    return Asked(group, version, namespace, plural, name, subresource)


def verb_of(method: str, asked: Asked, query: Mapping[str, str]) -> str:
    """The verb that a Role must have for it."""
    verb = VERBS[method]
    if asked.name or verb not in OF_MANY:
        return verb
    return "watch" if verb == "get" and query.get("watch", "").lower() in TRUE else OF_MANY[verb]


def name_of(asked: Asked, query: Mapping[str, str]) -> str:
    """The one object that it is about, by the path or by a field selector; empty where there is none."""
    return asked.name or name_in(query.get("fieldSelector", ""))
