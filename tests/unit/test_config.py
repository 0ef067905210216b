from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from infra.config import apply_overrides, load_yaml, parse
from infra.errors import ConfigError
from pipelines.spec import Spec, load_spec
from serving.config import ServeConfig

REPOSITORY = Path(__file__).resolve().parents[2]
MINIMAL = {"name": "toy", "base_model": "file:/base", "dataset": {"type": "files", "train": "rows.jsonl"}}


def write_spec(folder: Path, **changes: object) -> Path:
    path = folder / "spec.yaml"
    path.write_text(yaml.safe_dump(MINIMAL | changes))
    return path


def test_every_shipped_spec_loads() -> None:
    paths = sorted((REPOSITORY / "pipelines" / "specs").rglob("*.yaml"))
    assert paths
    for path in paths:
        assert load_spec(path, []).name


def test_unknown_keys_are_all_named_with_the_nearest_valid_key(tmp_path: Path) -> None:
    path = write_spec(tmp_path, trian={}, train={"lora": {"rnk": 4}, "epoch": 1})
    with pytest.raises(ConfigError) as caught:
        load_spec(path, [])
    message = caught.value.message
    assert "3 problem(s)" in message
    assert "trian: unknown key; did you mean 'train'?" in message
    assert "train.lora.rnk: unknown key; did you mean 'rank'?" in message
    assert "train.epoch: unknown key; did you mean 'epochs'?" in message


def test_unknown_key_in_a_union_names_the_chosen_member_keys(tmp_path: Path) -> None:
    path = write_spec(tmp_path, dataset={"type": "files", "train": "rows.jsonl", "helduot": "x"})
    with pytest.raises(ConfigError, match="did you mean 'heldout'"):
        load_spec(path, [])


def test_wrong_value_is_reported_with_its_path_and_what_was_found(tmp_path: Path) -> None:
    path = write_spec(tmp_path, train={"epochs": -1})
    with pytest.raises(ConfigError, match=r"train\.epochs: Input should be greater than 0 \(found -1\)"):
        load_spec(path, [])


def test_override_sets_a_nested_value_over_the_file(tmp_path: Path) -> None:
    spec = load_spec(write_spec(tmp_path, train={"epochs": 2}), ["train.epochs=0.5", "train.lora.rank=4", "serve.port=9001"])
    assert (spec.train.epochs, spec.train.lora.rank, spec.serve.port) == (0.5, 4, 9001)


@pytest.mark.parametrize("override", ["train.epochs", "=3", "train..epochs=1", "name.first=x", "train.epochs=[1"])
def test_override_of_a_bad_form_is_refused(override: str) -> None:
    with pytest.raises(ConfigError, match="--set"):
        apply_overrides(MINIMAL, [override])


def test_override_leaves_its_input_alone() -> None:
    data = {"train": {"epochs": 1}}
    apply_overrides(data, ["train.epochs=2"])
    assert data == {"train": {"epochs": 1}}


def test_relative_dataset_path_starts_at_the_spec_file(tmp_path: Path) -> None:
    spec = load_spec(write_spec(tmp_path), [])
    assert [source.path for source in spec.dataset.train] == [str(tmp_path / "rows.jsonl")]  # type: ignore[union-attr]


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [1\n", "\xff"])
def test_file_that_is_no_mapping_is_refused_by_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "spec.yaml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=str(path)):
        load_yaml(path)


def test_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load_yaml(tmp_path / "absent.yaml")


def test_fingerprint_changes_with_a_value_and_not_with_its_order(tmp_path: Path) -> None:
    reordered = dict(reversed(MINIMAL.items()))
    assert parse(Spec, MINIMAL, "a").fingerprint == parse(Spec, reordered, "b").fingerprint
    assert parse(Spec, MINIMAL, "a").fingerprint != parse(Spec, MINIMAL | {"name": "other"}, "b").fingerprint


def test_unknown_metric_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="exact_match_json"):
        load_spec(write_spec(tmp_path, evaluate={"metrics": ["blue"]}), [])


def test_pools_of_one_name_are_refused_and_each_keeps_what_the_server_says() -> None:
    with pytest.raises(ConfigError, match="several pools are named cpu"):
        parse(ServeConfig, {"pools": [{"name": "cpu"}, {"name": "cpu"}]}, "serve")
    config = parse(ServeConfig, {"max_running_requests": 7, "pools": [{"name": "cpu"}, {"name": "ref", "engine": "torch"}]}, "serve")
    settings = [config.of_pool(pool) for pool in config.pools]
    assert [(each.engine, each.max_running_requests, each.pools) for each in settings] == [("openvino", 7, ()), ("torch", 7, ())]


def test_pool_of_another_engine_does_not_run_under_the_python_of_the_servers() -> None:
    pools = [{"name": "same"}, {"name": "other", "engine": "torch"}, {"name": "own", "engine": "torch", "engine_python": "b"}]
    config = parse(ServeConfig, {"engine": "vllm", "engine_python": "a", "pools": pools}, "serve")
    assert [config.of_pool(pool).engine_python for pool in config.pools] == [Path("a"), None, Path("b")]
