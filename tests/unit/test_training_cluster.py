"""How many workers a run may have, and on which Ray they run."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from infra.config import parse
from infra.errors import ConfigError, TransientError
from infra.settings import load_settings
from training import preload
from training.cluster import Place, cpus_per_worker, ray_session
from training.config import EstimateJob, FinetuneJob, TrainConfig
from training.data.tokens import read_token_rows
from training.estimate import alternatives, available_memory_bytes, largest_pack
from training.finetune import IDLE_CALLBACKS, make_trainer


@pytest.mark.parametrize(("given", "fewest", "most"), [(3, 3, 3), ([1, 4], 1, 4), ([2, 2], 2, 2)])
def test_number_of_workers_is_one_number_or_two(given: Any, fewest: int, most: int) -> None:
    config = parse(TrainConfig, {"num_workers": given}, "spec")
    again = TrainConfig.model_validate_json(config.model_dump_json())
    assert (again.min_workers, again.max_workers) == (fewest, most)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"num_workers": [3, 1]}, r"num_workers \[3, 1\] has its larger number first"),
        ({"num_workers": [0, 2]}, r"num_workers.range.0: Input should be greater than or equal to 1 \(found 0\)"),
        ({"num_workers": [1, 2, 3]}, "at most 2 items"),
        ({"num_workers": 0}, "num_workers.number: Input should be greater than or equal to 1"),
        ({"num_workers": [2, 4], "parallel": {"shard": 2}}, r"num_workers \[2, 4\] may become a number that is no multiple of 2 = "),
        ({"num_workers": [3, 3], "parallel": {"tensor": 2}}, "num_workers 3 is no multiple of 2 = "),
    ],
)
def test_bad_number_of_workers_is_answered_with_one_problem(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        parse(TrainConfig, given, "spec")
    assert "1 problem(s)" in caught.value.message


@pytest.mark.parametrize(
    ("nodes", "workers", "cpus"), [([8], 1, 8), ([8], 3, 2), ([2], 4, 1), ([8, 8], 2, 8), ([8, 8], 3, 4), ([0, 4, 1], 2, 2), ([], 2, 1)]
)
def test_cores_of_a_worker_let_all_find_room(nodes: list[int], workers: int, cpus: int) -> None:
    assert cpus_per_worker(TrainConfig(num_workers=workers), nodes) == cpus
    assert cpus_per_worker(TrainConfig(num_workers=(1, workers)), nodes) == cpus
    assert cpus_per_worker(TrainConfig(num_workers=workers, cpus_per_worker=5), nodes) == 5


def test_estimate_counts_the_packs_of_the_fewest_workers_and_the_memory_of_the_most(toy_base: Path, toy_tokens: Path) -> None:
    rows = read_token_rows(toy_tokens, "train")
    one, four, elastic = (TrainConfig(batch_rows=8, num_workers=workers) for workers in (1, 4, (1, 4)))
    assert largest_pack(elastic, rows) == largest_pack(one, rows)
    assert largest_pack(elastic, rows).tokens > largest_pack(four, rows).tokens
    assert available_memory_bytes(elastic) == pytest.approx(available_memory_bytes(one) / 4, rel=0.1)
    assert {train.num_workers for name, train in alternatives(elastic) if "shard" in name} == {8, 16, 32}
    assert EstimateJob(output_dir=toy_base, base_dir=toy_base, tokens_dir=toy_tokens, train=elastic).train == elastic


def test_ray_address_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert load_settings().ray_address == "head:6379"
    monkeypatch.setenv("RAY_ADDRESS", "")
    assert load_settings().ray_address is None


@pytest.mark.parametrize(("address", "said"), [("ray://head:10001", "this is Ray Client"), ("head", "the form is host:port")])
def test_address_of_another_form_is_refused(address: str, said: str) -> None:
    with pytest.raises(ConfigError, match=f"RAY_ADDRESS={address}: {said}"), ray_session(TrainConfig(), address):
        pass


def test_address_where_nothing_answers_is_named(free_port: int) -> None:
    address = f"127.0.0.1:{free_port}"
    with pytest.raises(TransientError, match=f"RAY_ADDRESS={address}: nothing answers"), ray_session(TrainConfig(), address):
        pass


@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")  # Ray's own copy of its data settings names one that it deprecates
@pytest.mark.parametrize("workers", [1, (1, 2)])
def test_trainer_leaves_out_the_two_actors_that_have_nothing_to_do(workers: Any, tmp_path: Path) -> None:
    job = FinetuneJob(output_dir=tmp_path, base_dir=tmp_path, tokens_dir=tmp_path, train=TrainConfig(num_workers=workers))
    trainer = make_trainer(job, Place(1, use_gpu=False), tmp_path, [])
    without, of_ray = (
        {type(each).__name__ for each in made._create_default_callbacks()} for made in (trainer, super(type(trainer), trainer))
    )
    assert of_ray - without == set(IDLE_CALLBACKS)


def test_preload_is_for_the_processes_that_start_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(preload.SLOTS_VARIABLE, "")  # so that it is put back after
    preload.make_slots(tmp_path, num_workers=2)
    loaded: list[int] = []
    monkeypatch.setattr(preload, "load_trainer", lambda: loaded.append(len(list(tmp_path.glob("*.loading")))))
    for _ in range(6):
        preload.preload(tmp_path)
    assert loaded == [1, 1]  # the third and the fourth process, each seen to be loading by others
    assert not list(tmp_path.iterdir())


def test_preload_lets_processes_go_first_that_are_loading(tmp_path: Path) -> None:
    loading = tmp_path / "00002.loading"
    loading.touch()
    late = threading.Thread(target=preload.preload, args=(tmp_path,))
    late.start()
    late.join(0.3)
    assert late.is_alive()
    loading.unlink()
    late.join(5)
    assert not late.is_alive()


@pytest.mark.slow
@pytest.mark.parametrize("name", preload.HIDDEN)
def test_trainer_loads_without_packages_that_it_does_not_use_and_leaves_them_importable(name: str) -> None:
    code = f"from training.preload import load_trainer; import sys; load_trainer(); print('{name}' in sys.modules); import {name}"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "False"
