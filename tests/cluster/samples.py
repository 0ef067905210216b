"""Objects to try things with, each with a name of its own."""

from __future__ import annotations

import itertools
from typing import Any

WIDGETS = "test.slipway.dev/v1"
_numbers = itertools.count(1)


def name() -> str:
    """A name that no other object of this run has."""
    return f"sample-{next(_numbers)}"


def config_map(data: dict[str, str] | None = None, **metadata: Any) -> dict[str, Any]:
    """A ConfigMap."""
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name(), **metadata}, "data": data or {"a": "1"}}


def widget(size: int = 3, **spec: Any) -> dict[str, Any]:
    """A Widget."""
    return {"apiVersion": WIDGETS, "kind": "Widget", "metadata": {"name": name()}, "spec": {"size": size, **spec}}


def named(original: dict[str, Any], **parts: Any) -> dict[str, Any]:
    """Other content under the name of `original`."""
    return {**{key: original[key] for key in ("apiVersion", "kind")}, "metadata": {"name": original["metadata"]["name"]}, **parts}


def deployment(image: str = "registry.example/app:1", **spec: Any) -> dict[str, Any]:
    """A Deployment of one container, which never runs: no node can take it."""
    labels = {"app": "sample"}
    container = {"name": "app", "image": image, "env": [{"name": "A", "value": "1"}], "ports": [{"containerPort": 8000}]}
    pod = {"containers": [container], "nodeSelector": {"slipway.dev/none": "true"}}
    template = {"metadata": {"labels": labels}, "spec": pod}
    body = {"selector": {"matchLabels": labels}, "template": template, **spec}
    return {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": name()}, "spec": body}


def job() -> dict[str, Any]:
    """A Job that never runs."""
    pod = {
        "restartPolicy": "Never",
        "nodeSelector": {"slipway.dev/none": "true"},
        "containers": [{"name": "app", "image": "registry.example/app:1"}],
    }
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name()}, "spec": {"suspend": True, "template": {"spec": pod}}}


def pod(*containers: str) -> dict[str, Any]:
    """A Pod that never runs by itself."""
    listed = [{"name": each, "image": "registry.example/app:1"} for each in containers or ("app",)]
    spec = {"restartPolicy": "Never", "nodeSelector": {"slipway.dev/none": "true"}, "containers": listed}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name()}, "spec": spec}
