"""The charts in helm/ are the only source of manifests; the real `helm template` renders them."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from infra.errors import ConfigError

Chart = Literal["serving", "tracking", "training"]

REPOSITORY = Path(__file__).resolve().parents[1]
CHARTS_DIR = REPOSITORY / "helm"
TOOLS_DIR = REPOSITORY / ".tools" / "bin"
HELM_TIMEOUT_S = 60.0
INTEGER = re.compile(r"^[-+]?(0[0-7]*|[1-9][0-9]*)$")
FLOAT = re.compile(r"^[-+]?((\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+)$")
HELM_VARIABLES = ("PATH", "HOME", "TMPDIR", "HELM_CACHE_HOME", "HELM_CONFIG_HOME", "HELM_DATA_HOME")


@functools.cache
def _like_helm() -> Any:
    """A loader that reads scalars as Helm and the API server do: `=`, `12:30` and dates are text, and `4e+07` is a number."""

    class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
        """Of this module's own: the resolvers of PyYAML's are shared by everybody."""

    kept = {
        first: [(tag, pattern) for tag, pattern in found if not tag.endswith((":value", ":timestamp", ":int", ":float"))]
        for first, found in Loader.yaml_implicit_resolvers.items()
    }
    Loader.yaml_implicit_resolvers = kept
    Loader.add_implicit_resolver("tag:yaml.org,2002:int", INTEGER, list("-+0123456789"))
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+.0123456789"))
    return Loader


def helm_program() -> Path:
    """The `helm` of PATH, else the one that `make tools` put here. Raises ConfigError where there is none."""
    found = shutil.which("helm") or shutil.which("helm", path=str(TOOLS_DIR))
    if found is None:
        raise ConfigError(
            f"no program `helm` in PATH or {TOOLS_DIR}: it renders the charts. Run `make tools`, or install helm 3.18 or newer."
        )
    return Path(found)


def helm(arguments: Sequence[str], given: str = "") -> str:
    """What `helm ARGUMENTS` prints, with `given` on its standard input. Raises ConfigError with its own words where it refuses."""
    # No kubeconfig: what is rendered must depend on what is asked for alone.
    environment = {name: os.environ[name] for name in HELM_VARIABLES if name in os.environ}
    done = subprocess.run(
        [str(helm_program()), *arguments],
        input=given,
        capture_output=True,
        text=True,
        env=environment,
        timeout=HELM_TIMEOUT_S,
        check=False,
    )
    if done.returncode:
        raise ConfigError(f"helm {arguments[0]}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def render(
    chart: Chart,
    values: Mapping[str, Any],
    *,
    name: str,
    namespace: str = "default",
    kube_version: str | None = None,
    api_versions: Sequence[str] = (),
    profile: str | None = None,
) -> list[dict[str, Any]]:
    """The chart's manifests for the release `name`, in the order in which helm would install them.

    `values` lie over those of `profile` (`values-PROFILE.yaml`), which lie over the chart's own. `api_versions` are what the cluster
    knows beside the built-in ones, such as `monitoring.coreos.com/v1`. Raises ConfigError with the path of a value that is wrong.
    """
    folder = CHARTS_DIR / chart
    arguments = ["template", name, str(folder), "--namespace", namespace]
    if profile is not None:
        arguments += ["--values", str(profile_file(chart, profile))]
    arguments += ["--values", "-"]
    if kube_version is not None:
        arguments += ["--kube-version", kube_version]
    for api_version in api_versions:
        arguments += ["--api-versions", api_version]
    return parse_manifests(helm(arguments, json.dumps(values)))


def parse_manifests(text: str) -> list[dict[str, Any]]:
    """The objects in a stream of YAML documents; empty documents are left out."""
    return [document for document in yaml.load_all(text, Loader=_like_helm()) if document]


def layered(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """The layers as one, each over those before it: mappings are joined, anything else is replaced."""
    result: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            below = result.get(key)
            result[key] = layered(below, value) if isinstance(value, Mapping) and isinstance(below, Mapping) else value
    return result


def profiles(chart: Chart) -> list[str]:
    """Names of the chart's profiles, sorted."""
    return sorted(path.stem.removeprefix("values-") for path in (CHARTS_DIR / chart).glob("values-*.yaml"))


def profile_file(chart: Chart, profile: str) -> Path:
    """Values file of a profile. Raises ConfigError where the chart has no such profile."""
    path = CHARTS_DIR / chart / f"values-{profile}.yaml"
    if not path.is_file():
        raise ConfigError(f"profile {profile!r}: the chart {chart} has {', '.join(profiles(chart)) or 'none'}. Name one of them.")
    return path
