"""What can be refused before a model is pushed or a cluster is asked: everything that is wrong, at once.

What the chart itself refuses is among it: it is rendered once with stand-ins for what is not known yet, and for what was refused already.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from infra.config import load_yaml
from infra.errors import ConfigError, attempted
from infra.settings import Settings
from pipelines.charts import Chart, layered, profile_file
from pipelines.deploy import model, rendering
from pipelines.deploy.values import OWN_STORE, plain_values
from pipelines.spec import Spec, load_spec

Values = Mapping[str, Any]
ANY_NAME, ANY_NAMESPACE = "deployment", "default"
ANY_SOURCE = {"type": "store", "digest": "f" * 64}
ANY_STORE = {"url": "s3://bucket/slipway", "existingClaim": ""}
ANY_SECRET = {"existingSecret": ANY_NAME}
ALL_APIS = (rendering.RAY_API, "gateway.networking.k8s.io/v1", "monitoring.coreos.com/v1")
"""What the cluster knows is asked later."""


def check(chart: Chart, spec_path: Path, overrides: list[str], files: Sequence[Path], profile: str | None, settings: Settings) -> None:
    """Raises one ConfigError with all that is wrong with spec, values, profile and this machine's settings, as far as each can be read."""
    problems: list[str] = []
    spec = attempted(lambda: load_spec(spec_path, overrides), problems)
    given = layered(*(attempted(lambda path=path: load_yaml(path), problems) or {} for path in files))  # type: ignore[misc]
    of_profile = attempted(lambda: load_yaml(profile_file(chart, profile)), problems) if profile else {}
    said = layered(of_profile or {}, given)
    about_store = store_problems(chart, spec, said, settings)
    about_keys = _key_problems(spec, given) if spec and chart == "serving" else []
    problems += about_store + about_keys + (_draft_problems(spec, given) if spec and chart == "serving" else [])
    if spec is not None and of_profile is not None:
        stand_ins: dict[str, Any] = {"apiKeys": ANY_SECRET} if about_keys else {}
        if about_store or (chart == "serving" and _url_in(said) is None):
            stand_ins["store"] = ANY_STORE
        models = {"model": ANY_SOURCE, "adapters": dict.fromkeys(spec.serve.adapters, ANY_SOURCE)} if chart == "serving" else None
        values = layered(
            plain_values(chart, spec_path, overrides, ANY_NAME, settings), {"config": models} if models else {}, given, stand_ins
        )
        attempted(lambda: rendering.render(chart, values, ANY_NAME, ANY_NAMESPACE, profile, None, ALL_APIS), problems)
    if problems:
        raise ConfigError("\n".join(problems))


def store_problems(chart: Chart, spec: Spec | None, said: Values, settings: Settings) -> list[str]:
    """Why pods would not find what this machine puts into a store, a line each; empty where they would, or need nothing of it.

    `said` is what profile and values files say.
    """
    url, ours = _url_in(said), settings.store
    if chart == "tracking":
        return []
    if url is not None and url.startswith(OWN_STORE) and not said["store"].get("existingClaim"):
        return [
            f"store.url is {url}, a path of each pod's own. Name a volume that all pods share in store.existingClaim, or give a bucket: "
            "s3://BUCKET/PREFIX."
        ]
    source = (said.get("config") or {}).get("model")
    pushes = chart == "serving" and (source is None or _has_folders(spec))
    if ours is None:
        is_alone = pushes and (_has_folders(spec) or not settings.tracking_uri.startswith(("http://", "https://")))
        return (
            [f"SLIPWAY_STORE is not set, and the model lies on this machine, where no pod reaches it. {model.NEEDED}"] if is_alone else []
        )
    if url is None and ours.startswith(OWN_STORE) and (chart == "training" or pushes or (source or {}).get("type") == "store"):
        return [
            f"SLIPWAY_STORE is {ours}, a folder of this machine, and pods need a store that they reach too. Set it to a bucket such as "
            "s3://BUCKET/PREFIX, or share the folder as a volume and say store.url (file:///PATH) and store.existingClaim in a values file."
        ]
    if url not in (None, ours) and pushes and not url.startswith(OWN_STORE):  # a volume may have another path here
        return [f"store.url is {url}, where pods look, and SLIPWAY_STORE is {ours}, where this command puts the model. Make them the same."]
    return []


def _url_in(said: Values) -> str | None:
    url = (said.get("store") or {}).get("url")
    return str(url) if url else None


def _has_folders(spec: Spec | None) -> bool:
    """Whether there are models beside the one of the registry, in folders of this machine."""
    return spec is not None and (bool(spec.serve.adapters) or any(pool.model_dir for pool in spec.serve.pools))


def _key_problems(spec: Spec, given: Values) -> list[str]:
    """Leaving the keys out would open the endpoint to everyone."""
    if spec.serve.api_keys_file is None or (given.get("apiKeys") or {}).get("existingSecret"):
        return []
    return [
        "serve.api_keys_file is a file of this machine. Put it into a Secret (kubectl create secret generic NAME "
        "--from-file=api_keys.json=FILE), and name that in a values file under apiKeys.existingSecret."
    ]


def _draft_problems(spec: Spec, given: Values) -> list[str]:
    """A small model that guesses is no part of what is fetched by digest; its folder must be one that the pods have."""
    draft_dir = spec.serve.speculative.draft_model_dir if spec.serve.speculative else None
    said = (((given.get("config") or {}).get("serve") or {}).get("speculative") or {}).get("draft_model_dir")
    if draft_dir is None or said is not None:
        return []
    return [
        f"serve.speculative.draft_model_dir is {draft_dir}, a folder of this machine. Put it on a volume of the pods (`volumes`), and "
        "say its path there in a values file under config.serve.speculative.draft_model_dir."
    ]
