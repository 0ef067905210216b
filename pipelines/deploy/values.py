"""The values of a chart that follow from a spec and from this machine's settings; a values file of one's own lies over them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from infra.config import apply_overrides, load_yaml
from infra.errors import ConfigError
from infra.settings import Settings
from infra.signing import public_file
from pipelines.charts import Chart, layered
from pipelines.deploy import model
from pipelines.spec import Spec, load_spec

API_KEYS_PATH = "/etc/slipway/api-keys/api_keys.json"
TRUSTED_KEYS_PATH = "/etc/slipway/trusted/trusted.pem"
ALL_ADDRESSES = "0.0.0.0"  # of the pod alone; the NetworkPolicy says who reaches it
OF_THIS_MACHINE = {"host", "port", "engine_python", "api_keys_file", "trusted_keys_file", "adapters", "pools"}
Values = dict[str, Any]


def given_values(files: Sequence[Path]) -> Values:
    """What values files say together, the later over the earlier. Raises ConfigError on one that cannot be read."""
    return layered(*(load_yaml(path) for path in files))


def chart_values(
    chart: Chart, spec_path: Path, overrides: list[str], given: Mapping[str, Any], name: str, wanted: str, settings: Settings
) -> Values:
    """All values for the deployment `name` of a spec: what follows from it, and over that what was given.

    `wanted` is the version or alias of the registered model that is served. Raises ConfigError and RegistryError.
    """
    spec = load_spec(spec_path, overrides)
    own: Values = {"deployment": name, "managedBy": "slipway", **_addresses(settings)}
    if chart == "serving":
        return layered(own, serving_values(spec, given, name, wanted, settings), given)
    if chart == "training":
        # The file's own text: the paths of a loaded spec are those of this machine.
        return layered(own, {"config": apply_overrides(load_yaml(spec_path), overrides)}, given)
    return layered({key: value for key, value in own.items() if key not in ("store", "tracking")}, given)


def serving_values(spec: Spec, given: Mapping[str, Any], name: str, wanted: str, settings: Settings) -> Values:
    """The values of helm/serving that follow from a spec."""
    said = (given.get("config") or {}).get("model")
    config: Values = {
        "model_name": spec.name,
        "model": said if said is not None else model.registered_source(spec.name, wanted, settings),
        "serve": {**_settings_of(spec), "host": ALL_ADDRESSES},
    }
    _require_no_local_draft(spec, given)
    if spec.serve.adapters:
        config["adapters"] = {each: model.folder_source(folder, settings) for each, folder in spec.serve.adapters.items()}
    pool_models = {pool.name: model.folder_source(pool.model_dir, settings) for pool in spec.serve.pools if pool.model_dir}
    if pool_models:
        config["pool_models"] = pool_models
    values: Values = {"config": config, "gateway": {"tokenSecret": {"name": f"{name}-front", "key": "token"}}}
    if spec.serve.api_keys_file is not None:
        _require_keys(given)
        config["serve"]["api_keys_file"] = API_KEYS_PATH
    if keys := _trusted_keys(spec, settings):
        values["trustedKeys"] = {"pem": keys}
        config["serve"]["trusted_keys_file"] = TRUSTED_KEYS_PATH
    return values


def _settings_of(spec: Spec) -> Values:
    """What the spec itself says of serving, without what means this machine; the chart's own settings stand for the rest."""
    serve = spec.serve.model_dump(mode="json", exclude_unset=True, exclude=OF_THIS_MACHINE)
    pools = [pool.model_dump(mode="json", exclude_unset=True, exclude={"model_dir", "engine_python"}) for pool in spec.serve.pools]
    return {**serve, **({"pools": pools} if pools else {})}


def _require_keys(given: Mapping[str, Any]) -> None:
    """Leaving the keys out would open the endpoint to everyone."""
    if not ((given.get("apiKeys") or {}).get("existingSecret")):
        raise ConfigError(
            "serve.api_keys_file is a file of this machine. Put it into a Secret (kubectl create secret generic NAME "
            "--from-file=api_keys.json=FILE), and name that in a values file under apiKeys.existingSecret."
        )


def _require_no_local_draft(spec: Spec, given: Mapping[str, Any]) -> None:
    """A small model that guesses is no part of what is fetched by digest; its folder must be one that the pods have."""
    draft_dir = spec.serve.speculative.draft_model_dir if spec.serve.speculative else None
    said = (((given.get("config") or {}).get("serve") or {}).get("speculative") or {}).get("draft_model_dir")
    if draft_dir is not None and said is None:
        raise ConfigError(
            f"serve.speculative.draft_model_dir is {draft_dir}, a folder of this machine. Put it on a volume of the pods (`volumes`), and "
            "say its path there in a values file under config.serve.speculative.draft_model_dir."
        )


def _trusted_keys(spec: Spec, settings: Settings) -> str:
    """The public keys whose signatures count, as text; empty where this machine has none."""
    path = spec.serve.trusted_keys_file or public_file(settings.signing_key_file)
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _addresses(settings: Settings) -> Values:
    """Where store and tracking server are, as far as pods can reach them."""
    found: Values = {}
    if settings.store and not settings.store.startswith("file:"):
        found["store"] = {"url": settings.store}
    if settings.tracking_uri.startswith(("http://", "https://")):
        found["tracking"] = {"uri": settings.tracking_uri}
    return found
