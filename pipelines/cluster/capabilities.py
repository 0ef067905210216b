"""What a cluster can do, in the words that Helm's templates ask for it."""

from __future__ import annotations

from pipelines.cluster.client import Cluster, group_path

# An aggregated API whose own server is away answers 503 while all the rest works.
SKIPPED = (404, 503)


def kube_version(cluster: Cluster) -> str:
    """The version of Kubernetes without what a vendor appends, such as `1.34.2`."""
    version = str(cluster.request("GET", "/version", "ask for the version").body["gitVersion"])
    return version.removeprefix("v").partition("+")[0].partition("-")[0]


def api_versions(cluster: Cluster) -> list[str]:
    """Every group and version, `ray.io/v1`, and every kind in it, `ray.io/v1/RayJob`, sorted: the values of Helm's `--api-versions`."""
    groups = cluster.request("GET", "/apis", "ask for the APIs").body.get("groups") or []
    versions = ["v1", *(version["groupVersion"] for group in groups for version in group["versions"])]
    found = set(versions)
    for version in versions:
        answer = cluster.request("GET", group_path(version), f"look up {version}", expected=SKIPPED)
        found |= {f"{version}/{entry['kind']}" for entry in answer.body.get("resources") or [] if "/" not in entry["name"]}
    return sorted(found)
