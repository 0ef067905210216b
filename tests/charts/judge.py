"""One verdict on rendered manifests: the schemas of built-in and custom kinds, and the rules that no schema has."""

from __future__ import annotations

import functools
import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import kubernetes_validate
from kubernetes_validate.utils import SchemaNotFoundError

from tests.charts.agreement import release_problems
from tests.charts.crds import CustomKind, admit, crds_folder, custom_kinds, read_crds
from tests.charts.kinds import OUR_KINDS
from tests.charts.kuberay_rules import kuberay_problems
from tests.charts.object_rules import object_problems
from tests.charts.pod_rules import pod_problems
from tests.charts.pods import Document, pod_templates, told

# Of a request to an API server and of what etcd keeps; metadata that the server adds must fit too.
MAX_OBJECT_BYTES = 1_500_000
BUILT_IN_GROUPS = ("k8s.io",)
OTHER_GROUPS = ("gateway.networking.k8s.io",)

Kinds = Mapping[tuple[str, str], CustomKind]
_VERDICTS: dict[tuple[str, str, int], list[str]] = {}


@functools.cache
def known_kinds() -> Kinds:
    """Custom kinds: those of tests/charts/kinds, and KubeRay's where its definitions are."""
    folder = crds_folder()
    return {**custom_kinds(OUR_KINDS), **(custom_kinds(read_crds(folder)) if folder else {})}


def judge(documents: Sequence[Document], kube_version: str, given: Collection[str] = (), later: Sequence[Document] = ()) -> list[str]:
    """Everything that is wrong with a rendered chart, a line each.

    `kube_version` is such as `1.34` or `1.34.0`; `given` and `later` are those of `release_problems`.
    """
    kinds = known_kinds()
    wrong = [(told(document), document_problems(document, kube_version, kinds)) for document in documents]
    found = [f"{name}: {line}" for name, lines in wrong for line in lines]
    if found:  # the rest reads what must be right by itself
        return found
    return release_problems([without_nulls(document) for document in documents], given, [without_nulls(document) for document in later])


def document_problems(document: Document, kube_version: str, kinds: Kinds) -> list[str]:
    """Everything that is wrong with one object by itself."""
    # Most objects are the same in many renderings, and a schema takes its time.
    text = json.dumps(document, sort_keys=True)
    key = (text, kube_version if is_built_in(str(document.get("apiVersion"))) else "", id(kinds))
    if key not in _VERDICTS:
        _VERDICTS[key] = _problems(document, len(text.encode()), kube_version, kinds)
    return _VERDICTS[key]


def _problems(document: Document, size: int, kube_version: str, kinds: Kinds) -> list[str]:
    too_large = [f"{size} bytes, {MAX_OBJECT_BYTES} at most"] if size > MAX_OBJECT_BYTES else []
    wrong = schema_problems(document, kube_version, kinds)
    if wrong:  # the rules below read fields of the right type
        return too_large + wrong
    document = without_nulls(document)
    pods = [line for pod in pod_templates(document) for line in pod_problems(pod)]
    return [*too_large, *object_problems(document), *kuberay_problems(document), *pods]


def without_nulls(value: Any) -> Any:
    """As an API server stores it: a null is as good as absent."""
    if isinstance(value, dict):
        return {key: without_nulls(below) for key, below in value.items() if below is not None}
    return [without_nulls(below) for below in value] if isinstance(value, list) else value


def schema_problems(document: Document, kube_version: str, kinds: Kinds) -> list[str]:
    """What the schema of its kind says; a kind without a schema is a problem too."""
    api_version, kind = str(document.get("apiVersion")), str(document.get("kind"))
    if is_built_in(api_version):
        return list(_built_in(document, kube_version))
    if (api_version, kind) not in kinds:
        return [f"no schema of {api_version} {kind} is known here"]
    admission = admit(document, kinds[api_version, kind])
    return [f"{path}: unknown field" for path in admission.unknown] + admission.problems


def is_built_in(api_version: str) -> bool:
    """Whether Kubernetes itself has the kinds of this group."""
    group = api_version.rpartition("/")[0]
    return "." not in group or (group.endswith(BUILT_IN_GROUPS) and group not in OTHER_GROUPS)


def _built_in(document: Document, kube_version: str) -> tuple[str, ...]:
    try:
        kubernetes_validate.validate(dict(document), kube_version, strict=True)
    except kubernetes_validate.ValidationError as error:
        return (f"{'.'.join(map(str, error.path)) or '(the object)'}: {error.message[:300]}",)
    except SchemaNotFoundError as error:
        return (f"Kubernetes {kube_version} has no such kind: {error.message}",)
    return ()


def needs_kuberay(documents: Sequence[Mapping[str, Any]], kinds: Kinds) -> bool:
    """Whether objects of KubeRay are among them and its definitions are not here."""
    return any(document["apiVersion"].startswith("ray.io/") for document in documents) and ("ray.io/v1", "RayJob") not in kinds
