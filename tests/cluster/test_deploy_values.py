"""From a spec to the values of each chart, and to manifests in a folder; nothing here asks a cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from infra import registry, tracking, uploads
from infra.artifact_store import open_store
from infra.contracts import ModelFacts, read_manifest, write_manifest
from infra.errors import ConfigError, RegistryError
from infra.provenance import Provenance
from infra.settings import Settings
from pipelines.charts import layered
from pipelines.deploy import model, rendering, values
from pipelines.deploy.commands import deployment_name
from pipelines.serve import with_engine
from serving.cluster_config import ClusterConfig, PathSource
from serving.config import ServeConfig, ServeJob
from serving.model_source import job_on_this_node

MODEL = {"type": "store", "digest": "a" * 64}
GIVEN = {"config": {"model": MODEL}}
ENGINES = {"bnb-nf4": "torch", "openvino-int8": "openvino"}


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path / "home", tracking_uri="http://mlflow:5000", store="s3://bucket/slipway")


def write_spec(folder: Path, **parts: Any) -> Path:
    spec = {"name": "toy.model_1", "base_model": "hf:some/model", "dataset": {"type": "smart_home"}, **parts}
    path = folder / "toy.yaml"
    path.write_text(yaml.safe_dump(spec))
    return path


def serving(spec: Path, settings: Settings, given: dict[str, Any] = GIVEN) -> dict[str, Any]:
    return values.chart_values("serving", spec, [], given, "toy", "champion", settings)


def test_layers_join_mappings_and_replace_all_else() -> None:
    below, above = {"a": {"b": 1, "c": [1, 2]}, "d": {"e": 1}}, {"a": {"c": [3]}, "d": 5}
    assert layered(below, above) == {"a": {"b": 1, "c": [3]}, "d": 5}
    assert below == {"a": {"b": 1, "c": [1, 2]}, "d": {"e": 1}}


def test_name_of_a_deployment_is_one_that_a_cluster_takes(tmp_path: Path) -> None:
    spec = write_spec(tmp_path)
    assert deployment_name(spec) == "toy-model-1"
    assert deployment_name(spec, "training") == "toy-model-1-training"
    assert deployment_name("as-it-is") == "as-it-is"


def test_serving_gets_what_the_spec_says_and_nothing_that_means_this_machine(tmp_path: Path, settings: Settings) -> None:
    spec = write_spec(tmp_path, serve={"port": 9000, "host": "127.0.0.1", "max_running_requests": 7, "engine_python": "/here/python"})
    found = serving(spec, settings)
    assert found["config"]["serve"] == {"host": "0.0.0.0", "max_running_requests": 7}
    assert found["config"]["model_name"] == "toy.model_1"
    assert found["config"]["model"] == MODEL
    assert (found["store"], found["tracking"]) == ({"url": "s3://bucket/slipway"}, {"uri": "http://mlflow:5000"})
    assert (found["deployment"], found["managedBy"]) == ("toy", "slipway")


def test_addresses_that_no_pod_reaches_are_left_out(tmp_path: Path) -> None:
    alone = Settings(home=tmp_path, tracking_uri="sqlite:///x.db", store="file:///somewhere")
    assert not {"store", "tracking"} & set(serving(write_spec(tmp_path), alone))


def test_values_of_ones_own_lie_over_all_else(tmp_path: Path, settings: Settings) -> None:
    spec = write_spec(tmp_path, serve={"max_running_requests": 7})
    given = {"config": {"model": MODEL, "serve": {"max_running_requests": 3}}, "gateway": {"replicas": 5}}
    found = serving(spec, settings, given)
    assert found["config"]["serve"]["max_running_requests"] == 3
    assert found["gateway"] == {"tokenSecret": {"name": "toy-front", "key": "token"}, "replicas": 5}


def test_keys_of_clients_are_asked_for_where_the_chart_mounts_them(tmp_path: Path, settings: Settings) -> None:
    spec = write_spec(tmp_path, serve={"api_keys_file": "/home/me/api_keys.json"})
    found = serving(spec, settings, {**GIVEN, "apiKeys": {"existingSecret": "keys"}})
    assert found["config"]["serve"]["api_keys_file"] == values.API_KEYS_PATH


def test_folder_of_a_draft_model_is_the_one_that_the_pods_have(tmp_path: Path, settings: Settings) -> None:
    spec = write_spec(tmp_path, serve={"speculative": {"kind": "draft", "draft_model_dir": "/here/small"}})
    there = {"config": {"model": MODEL, "serve": {"speculative": {"draft_model_dir": "/models/small"}}}}
    assert serving(spec, settings, there)["config"]["serve"]["speculative"] == {"kind": "draft", "draft_model_dir": "/models/small"}


def test_public_keys_go_along(tmp_path: Path, settings: Settings) -> None:
    keys = settings.home / "keys"
    keys.mkdir(parents=True)
    (keys / "signing.pub").write_text("-----BEGIN PUBLIC KEY-----\n")
    found = serving(write_spec(tmp_path), settings)
    assert found["trustedKeys"]["pem"].startswith("-----BEGIN")
    assert found["config"]["serve"]["trusted_keys_file"] == values.TRUSTED_KEYS_PATH


def test_adapter_of_this_machine_is_pushed_and_named_by_digest(tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "weights").write_text("w")
    digest = write_manifest(adapter, "adapter", Provenance()).digest
    spec = write_spec(tmp_path, serve={"adapters": {"red": str(adapter)}})
    url = (tmp_path / "store").as_uri()
    found = serving(spec, Settings(home=tmp_path / "home", tracking_uri="sqlite:///x", store=url))
    assert found["config"]["adapters"] == {"red": {"type": "store", "digest": digest}}
    assert open_store(url).find(digest) is not None
    with pytest.raises(ConfigError, match="SLIPWAY_STORE"):
        serving(spec, Settings(home=tmp_path / "home", tracking_uri="sqlite:///x"))


def test_training_gets_the_text_of_the_spec_and_not_paths_of_this_machine(tmp_path: Path, settings: Settings) -> None:
    spec = write_spec(tmp_path, dataset={"type": "files", "train": "rows.jsonl"})
    found = values.chart_values("training", spec, ["train.epochs=3"], {}, "toy-training", "champion", settings)
    assert found["config"]["dataset"]["train"] == "rows.jsonl"
    assert found["config"]["train"] == {"epochs": 3}


def test_faulty_spec_and_values_are_refused_before_anything_is_rendered(tmp_path: Path, settings: Settings) -> None:
    with pytest.raises(ConfigError, match="serv: unknown key"):
        serving(write_spec(tmp_path, serv={}), settings)
    with pytest.raises(ConfigError, match=r"absent\.yaml"):
        values.given_values([tmp_path / "absent.yaml"])


@pytest.mark.parametrize("chart", ["serving", "training", "tracking"])
def test_values_of_a_spec_render_with_every_chart(chart: Any, tmp_path: Path, settings: Settings) -> None:
    given = {"serving": {**GIVEN, "config": {"model": MODEL, "serve": {"allow_unsigned": ["toy.model_1"]}}}}.get(chart, {})
    found = values.chart_values(chart, write_spec(tmp_path), [], given, "toy", "champion", settings)
    manifests = rendering.render(chart, found, "toy", "default", None)
    assert manifests
    assert {manifest["metadata"]["labels"]["slipway.dev/deployment"] for manifest in manifests} == {"toy"}


def config_map(name: str) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": {"a": "b"}}


def test_render_writes_a_plain_folder_and_takes_away_only_what_it_wrote(tmp_path: Path) -> None:
    folder = tmp_path / "manifests"
    role = {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole", "metadata": {"name": "r"}}
    rendering.write_manifests([config_map("one"), config_map("two"), role], "team", folder)
    (folder / "of-someone.yaml").write_text("kind: Mine")
    written = rendering.write_manifests([config_map("one"), role], "team", folder)
    assert [path.name for path in written] == ["configmap-one.yaml", "clusterrole-r.yaml"]
    assert sorted(path.name for path in folder.glob("*.yaml")) == ["clusterrole-r.yaml", "configmap-one.yaml", "of-someone.yaml"]
    assert yaml.safe_load((folder / "configmap-one.yaml").read_text())["metadata"] == {"name": "one", "namespace": "team"}
    assert "namespace" not in yaml.safe_load((folder / "clusterrole-r.yaml").read_text())["metadata"]


@pytest.fixture(scope="module")
def registered(tmp_path_factory: pytest.TempPathFactory) -> tuple[Settings, Path]:
    """The settings of a machine with a registered champion of `lamp`, and its folder; beside it, one of each weight format by its name."""
    home = tmp_path_factory.mktemp("registered") / "home"
    folder = home / "artifacts" / "quantize-1"
    folder.mkdir(parents=True)
    (folder / "weights").write_text("w")
    digest = write_manifest(folder, "quantized", Provenance()).digest
    settings = Settings(home=home, tracking_uri=f"sqlite:///{home}/mlflow.db", store=(home.parent / "store").as_uri())
    client = tracking.client(settings.tracking_uri)
    run_id = tracking.start_run(client, tracking.ensure_experiment(client, "tests", home / "mlartifacts"), "run")
    registry.promote(client, registry.register(client, "lamp", folder, digest, run_id))
    for name in ENGINES:
        made = quantized(folder.parent / name, name)
        registry.promote(client, registry.register(client, name, made, read_manifest(made).digest, run_id))
    return settings, folder


def test_champion_is_named_by_digest_and_goes_into_the_store_with_its_seal(registered: tuple[Settings, Path]) -> None:
    settings, folder = registered
    store = open_store(str(settings.store))
    source = model.registered("lamp", "champion", settings).source
    assert source == {"type": "store", "digest": read_manifest(folder).digest} == model.registered("lamp", "1", settings).source
    (folder / "seal").mkdir()
    (folder / "seal" / "signature").write_text("s")  # it was promoted by force meanwhile, say
    model.registered("lamp", "champion", settings)
    fetched = store.fetch_digest(source["digest"], settings.home.parent / "node" / "artifacts")
    assert (fetched / "seal" / "signature").read_text() == "s"
    with pytest.raises(RegistryError, match="challenger"):
        model.registered("lamp", "challenger", settings)


def test_trial_names_the_champion_and_leaves_the_store_as_it_is(registered: tuple[Settings, Path], tmp_path: Path) -> None:
    settings, folder = registered
    empty = settings.model_copy(update={"store": (tmp_path / "store").as_uri()})
    tried = model.registered("openvino-int8", "champion", empty, is_trial=True)
    assert tried.weight_format == "openvino-int8"
    assert model.folder_source(folder, empty, is_trial=True) == {"type": "store", "digest": read_manifest(folder).digest}
    assert not list(tmp_path.rglob("*"))
    assert model.registered("openvino-int8", "champion", empty) == tried
    assert open_store(str(empty.store)).find(tried.source["digest"])


def test_champion_whose_files_no_pod_reaches_is_refused(registered: tuple[Settings, Path]) -> None:
    settings, _ = registered
    with pytest.raises(ConfigError, match="where no pod reaches them"):
        model.registered("lamp", "champion", settings.model_copy(update={"store": None}))


def job_of_a_replica(found: dict[str, Any], folder: Path, **options: Any) -> ServeJob:
    """What a replica is told where the chart is installed with these values, and its node has the model in `folder`."""
    manifests = rendering.render("serving", found, "toy", "default", **{"profile": None, **options})
    (service,) = [manifest for manifest in manifests if manifest["kind"] == "RayService"]
    (application,) = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    config = ClusterConfig.model_validate(application["args"]["config"])
    return job_on_this_node(config.model_copy(update={"model": PathSource(path=folder)}), "", Settings(home=folder, tracking_uri="x"))


def quantized(folder: Path, weight_format: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "weights").write_text(weight_format)
    facts = {"base_model": "b", "base_digest": "b", "tokenizer_digest": "t", "chat_template_digest": "c", "special_tokens": {}}
    model_facts = ModelFacts.model_validate({**facts, "context_tokens": 8, "stop_ids": [1], "quantization": weight_format})
    write_manifest(folder, "quantized", Provenance(), model_facts)
    return folder


@pytest.mark.parametrize(("weight_format", "engine"), ENGINES.items())
@pytest.mark.parametrize("profile", [None, "gpu"])
def test_engine_of_a_deployment_is_the_one_that_serve_would_take(
    weight_format: str, engine: str, profile: str | None, tmp_path: Path, registered: tuple[Settings, Path]
) -> None:
    """The profile for GPUs names vLLM, which reads none of these."""
    settings, lamp = registered
    folder = lamp.parent / weight_format
    trusted = {"store": {"url": "s3://b/x"}, "config": {"serve": {"allow_unsigned": [weight_format]}}}
    found = serving(write_spec(tmp_path, name=weight_format), settings, trusted)
    wanted = with_engine(ServeConfig(), folder).engine
    assert (job_of_a_replica(found, folder, profile=profile).serve.engine, wanted) == (engine, engine)
    said = serving(write_spec(tmp_path, name=weight_format, serve={"engine": "vllm"}), settings, trusted)
    assert job_of_a_replica(said, folder, profile=profile).serve.engine == "vllm"


def test_weight_format_of_a_version_whose_files_lie_in_its_run_is_read_there(registered: tuple[Settings, Path], tmp_path: Path) -> None:
    settings, _ = registered
    client, made = tracking.client(settings.tracking_uri), quantized(tmp_path / "made", "bnb-int8")
    run_id = tracking.start_run(client, tracking.ensure_experiment(client, "tests", settings.home / "mlartifacts"), "far")
    digest = read_manifest(made).digest
    version = registry.register(client, "far", made, digest, run_id, lambda: uploads.upload(client, run_id, made, tmp_path / "scratch"))
    empty = settings.model_copy(update={"store": (tmp_path / "store").as_uri()})
    assert model.registered("far", version.version, empty, is_trial=True).weight_format == "bnb-int8"


def test_engine_of_a_model_that_values_name_is_left_to_its_replicas(tmp_path: Path, settings: Settings) -> None:
    """They have its weights; this machine may not."""
    given = {"config": {"model": MODEL, "serve": {"allow_unsigned": ["toy.model_1"]}}}
    found = serving(write_spec(tmp_path), settings, given)
    assert "engine" not in found["config"]["serve"]
    for weight_format, engine in (("bnb-nf4", "torch"), ("openvino-int4", "openvino")):
        folder = quantized(tmp_path / weight_format, weight_format)
        assert job_of_a_replica(found, folder).serve.engine == engine
