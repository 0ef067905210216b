"""Finds the cluster that a command means: an explicit kubeconfig, `KUBECONFIG`, the usual file, or the one that this pod runs in."""

from __future__ import annotations

import os
from pathlib import Path

import yaml
from kubernetes.client import ApiClient, Configuration
from kubernetes.config import ConfigException, list_kube_config_contexts, load_incluster_config, load_kube_config

from infra.errors import ConfigError
from infra.settings import kubeconfig_files
from pipelines.cluster.client import Cluster

POD_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


def connect(kubeconfig: Path | None = None, context: str | None = None, namespace: str | None = None, patience_s: float = 120.0) -> Cluster:
    """A connection to the cluster, which is not asked anything yet. Raises ConfigError where none is configured.

    `namespace` is by default the context's own, or the pod's.
    """
    configuration = Configuration()
    files = str(kubeconfig) if kubeconfig else kubeconfig_files()
    if kubeconfig or context or any(Path(name).is_file() for name in files.split(os.pathsep)):
        found = _from_kubeconfig(configuration, files, context)
    else:
        found = _from_pod(configuration, files)
    configuration.retries = False  # type: ignore[assignment]  # tries again are ours, with pauses; urllib3's have none
    configuration.keep_alive = True  # a watch over a firewall that forgets connections would wait for ever
    return Cluster(ApiClient(configuration), namespace or found, patience_s)


def _from_kubeconfig(configuration: Configuration, files: str, context: str | None) -> str:
    """Fills in the configuration; gives the context's namespace."""
    try:
        load_kube_config(config_file=files, context=context, client_configuration=configuration)
        contexts, active = list_kube_config_contexts(config_file=files)
    except (ConfigException, OSError, yaml.YAMLError) as error:
        raise ConfigError(f"kubeconfig {files}: {error}. Name another by --kubeconfig or KUBECONFIG, or another --context.") from error
    chosen = next((entry for entry in contexts if entry["name"] == context), active)
    return str(chosen["context"].get("namespace") or "default")


def _from_pod(configuration: Configuration, files: str) -> str:
    """Fills in the configuration from the pod's service account; gives the pod's namespace."""
    try:
        load_incluster_config(client_configuration=configuration)
    except ConfigException as error:
        found = f"no cluster: {files} does not exist, and this is not a pod with a service account ({error})"
        raise ConfigError(f"{found}. Set KUBECONFIG, or name the file by --kubeconfig.") from error
    return POD_NAMESPACE.read_text().strip() if POD_NAMESPACE.is_file() else "default"
