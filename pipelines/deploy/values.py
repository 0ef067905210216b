"""The values of a chart that follow from a spec and from this machine's settings; a values file of one's own lies over them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from infra.config import apply_overrides, load_yaml
from infra.settings import Settings
from infra.signing import public_file
from pipelines.charts import Chart, layered
from pipelines.deploy import model
from pipelines.spec import Spec, load_spec
from serving.limits import with_engine_of

API_KEYS_PATH = "/etc/slipway/api-keys/api_keys.json"
TRUSTED_KEYS_PATH = "/etc/slipway/trusted/trusted.pem"
ALL_ADDRESSES = "0.0.0.0"  # of the pod alone; the NetworkPolicy says who reaches it
OWN_STORE = "file:"
OF_THIS_MACHINE = {"host", "port", "engine_python", "api_keys_file", "trusted_keys_file", "adapters", "pools"}
Values = dict[str, Any]


def given_values(files: Sequence[Path]) -> Values:
    """What values files say together, the later over the earlier. Raises ConfigError on one that cannot be read."""
    return layered(*(load_yaml(path) for path in files))


def chart_values(
    chart: Chart,
    spec_path: Path,
    overrides: list[str],
    given: Mapping[str, Any],
    name: str,
    wanted: str,
    settings: Settings,
    is_trial: bool = False,
) -> Values:
    """All values for the deployment `name` of a spec: what follows from it, and over that what was given.

    `wanted` is the version or alias of the registered model that is served; it is pushed to the store, where there is one and this is no
    trial. Raises ConfigError and RegistryError.
    """
    own = plain_values(chart, spec_path, overrides, name, settings)
    if chart != "serving":
        return layered(own, given)
    return layered(own, {"config": _models(load_spec(spec_path, overrides), given, wanted, settings, is_trial)}, given)


def plain_values(chart: Chart, spec_path: Path, overrides: list[str], name: str, settings: Settings) -> Values:
    """Those of them that neither the registry nor the store is asked for. Raises ConfigError on a faulty spec."""
    spec = load_spec(spec_path, overrides)
    own: Values = {"deployment": name, "managedBy": "slipway"}
    if chart == "tracking":
        return own
    own |= _addresses(settings)
    if chart == "training":
        # The file's own text: the paths of a loaded spec are those of this machine.
        return {**own, "config": apply_overrides(load_yaml(spec_path), overrides)}
    serve = {**_settings_of(spec), "host": ALL_ADDRESSES}
    if spec.serve.api_keys_file is not None:
        serve["api_keys_file"] = API_KEYS_PATH
    own |= {"config": {"model_name": spec.name, "serve": serve}, "gateway": {"tokenSecret": {"name": f"{name}-front", "key": "token"}}}
    if keys := _trusted_keys(spec, settings):
        own["trustedKeys"] = {"pem": keys}
        serve["trusted_keys_file"] = TRUSTED_KEYS_PATH
    return own


def _models(spec: Spec, given: Mapping[str, Any], wanted: str, settings: Settings, is_trial: bool) -> Values:
    """What is served, each by its digest, and by which engine; pushed to the store where it is not there, but for a trial."""
    found: Values = {}
    if (given.get("config") or {}).get("model") is None:
        registered = model.registered(spec.name, wanted, settings, is_trial)
        found["model"] = registered.source
        # Said here, as a profile may name an engine, which knew of no model.
        serve = with_engine_of(spec.serve, registered.weight_format)
        found["serve"] = {"engine": serve.engine} if "engine" in serve.model_fields_set else {}
    if spec.serve.adapters:
        found["adapters"] = {each: model.folder_source(folder, settings, is_trial) for each, folder in spec.serve.adapters.items()}
    pool_models = {pool.name: model.folder_source(pool.model_dir, settings, is_trial) for pool in spec.serve.pools if pool.model_dir}
    return {**found, **({"pool_models": pool_models} if pool_models else {})}


def _settings_of(spec: Spec) -> Values:
    """What the spec itself says of serving, without what means this machine; the chart's own settings stand for the rest."""
    serve = spec.serve.model_dump(mode="json", exclude_unset=True, exclude=OF_THIS_MACHINE)
    pools = [pool.model_dump(mode="json", exclude_unset=True, exclude={"model_dir", "engine_python"}) for pool in spec.serve.pools]
    return {**serve, **({"pools": pools} if pools else {})}


def _trusted_keys(spec: Spec, settings: Settings) -> str:
    """The public keys whose signatures count, as text; empty where this machine has none."""
    path = spec.serve.trusted_keys_file or public_file(settings.signing_key_file)
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _addresses(settings: Settings) -> Values:
    """Where store and tracking server are, as far as pods can reach them."""
    found: Values = {}
    if settings.store and not settings.store.startswith(OWN_STORE):
        found["store"] = {"url": settings.store}
    if settings.tracking_uri.startswith(("http://", "https://")):
        found["tracking"] = {"uri": settings.tracking_uri}
    return found
