"""Moving aliases on a real store: killed at every call, two at once, forced, refused and rolled back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from infra import aliases, lease, registry, tracking
from infra.errors import ConfigError, GateFailed, RegistryError, TransientError
from infra.registry import CHALLENGER, CHAMPION, PREVIOUS
from pipelines import promotion
from pipelines.registration import CERTIFICATE_TAG

PROMOTER = Path(__file__).with_name("promoter.py")
PASSED = [{"name": "score", "passed": True, "detail": "0.9, at least 0.8 needed"}]
REFUSED = [{"name": "score", "passed": False, "detail": "0.7, at least 0.8 needed"}, {"name": "gain", "passed": True, "detail": "0.1"}]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("mlflow")
    uri = f"sqlite:///{folder}/mlflow.db"
    client = tracking.client(uri)
    run_id = tracking.start_run(client, tracking.ensure_experiment(client, "tests", folder / "artifacts"), "run")
    return client, uri, folder, run_id


def versions_of(store: Any, name: str, num: int, gates: Any = PASSED, certificate: str = "holds") -> list[registry.RegisteredVersion]:
    """Version 1 to `num`, each once the challenger."""
    client, _, folder, run_id = store
    made = []
    for number in range(num):
        version = registry.register(client, name, folder / f"{name}-{number}", f"digest-{number}", run_id)
        registry.write_tags(client, version, {CERTIFICATE_TAG: certificate})
        registry.mark_challenger(client, version, gates)
        made.append(registry.lookup(client, name, version.version))
    return made


def pointed(store: Any, name: str) -> tuple[str | None, str | None]:
    found = aliases.read(store[0], name)
    return found.get(CHAMPION), found.get(PREVIOUS)


def promoter(*arguments: object) -> subprocess.Popen[str]:
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), *sys.path])}
    command = [sys.executable, str(PROMOTER), *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def race(uri: str, name: str, *versions: str) -> list[dict[str, Any]]:
    """What a process for each version tells of promoting it, all at once; one of them has won."""
    racing = [promoter("meet", uri, name, version) for version in versions]
    for process in racing:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in racing:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    told = []
    for process in racing:
        stdout, stderr = process.communicate(timeout=60)
        assert process.returncode == 0, stderr
        told.append(json.loads(stdout))
    assert sorted(each["won"] for each in told) == [False, True]
    return told


def check_kills(client: Any, uri: str, watch_uri: str, name: str) -> None:
    """Version 2 is champion and 1 previous: whatever call a promotion of 3 is killed before, the aliases are all old or all new."""
    process = promoter("kill", uri, watch_uri, name, "2", "3")
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    outcomes = json.loads(stdout)
    assert len(outcomes) > 10
    assert [each["code"] for each in outcomes] == [-9] * (len(outcomes) - 1) + [0]
    happened = []
    for each in outcomes:
        old = each["before"]
        new = {CHAMPION: "3", PREVIOUS: old[CHAMPION]}
        assert each["left"] in (old, new), each
        assert each["raw"][CHAMPION] == old[CHAMPION] or each["raw"] == {**each["raw"], **new}, each
        happened.append(each["left"] == new)
        assert each["after"] == ({CHAMPION: "2", PREVIOUS: "3"} if happened[-1] else old), each
        assert each["noted"] == happened[-1], "who promoted is known exactly where it happened"
    assert happened == sorted(happened), "once it has happened, it has happened"
    assert set(happened) == {True, False}
    assert aliases.MOVE_TAG not in client.get_registered_model(name).tags
    assert not client.search_registered_models(f"name LIKE '{lease.PREFIX}{name}%'")


def test_promotion_killed_before_any_call_leaves_the_old_aliases_or_the_new(store: Any) -> None:
    client, uri = store[:2]
    for version in versions_of(store, "killed", 3)[:2]:
        registry.promote(client, version)
    check_kills(client, uri, uri.replace("sqlite:///", "sqlite:////"), "killed")


def test_first_promotion_cut_off_before_champion_leaves_no_champion(store: Any) -> None:
    client = store[0]
    (version,) = versions_of(store, "first", 1)

    def lost() -> None:
        if aliases.MOVE_TAG in client.get_registered_model("first").tags:
            raise TransientError("the lease ran out")

    with pytest.raises(TransientError):
        aliases.move(client, "first", version.version, {}, lost)
    assert pointed(store, "first") == (None, None)
    assert registry.promote(client, version).aliases == (CHALLENGER, CHAMPION)
    assert pointed(store, "first") == ("1", None)


def test_two_promotions_at_once_one_wins_and_the_other_is_told(store: Any) -> None:
    client, uri = store[:2]
    one, *_ = versions_of(store, "raced", 3)
    registry.promote(client, one)
    told = race(uri, "raced", "2", "3")
    (loser,) = (each for each in told if not each["won"])
    assert loser["exit_code"] == 75
    assert "slipway status raced" in loser["message"]
    winner = "2" if told[0]["won"] else "3"
    assert pointed(store, "raced") == (winner, "1")


def test_lease_that_another_process_holds_names_the_holder(store: Any) -> None:
    client = store[0]
    (version,) = versions_of(store, "held", 1)
    with lease.held(client, "held"), pytest.raises(TransientError, match=rf"{lease.who_am_i()}, process {os.getpid()}"):
        registry.promote(client, version)
    assert pointed(store, "held") == (None, None)
    registry.promote(client, version)


@pytest.mark.parametrize("change", [{"pid": 2**22 + 1}, {"since_s": 0.0, "space": "elsewhere"}, {"started_s": 1.0}])
def test_lease_of_a_holder_that_is_gone_is_put_aside(store: Any, change: dict[str, Any]) -> None:
    client, name = store[0], f"gone-{next(iter(change))}"
    (version,) = versions_of(store, name, 1)
    old = lease.Holder(**change)
    client.create_registered_model(lease.PREFIX + name, tags={lease.HOLDER_TAG: old.model_dump_json()})
    registry.promote(client, version)
    assert pointed(store, name) == ("1", None)
    assert not client.search_registered_models(f"name LIKE '{lease.PREFIX}{name}%'")


def test_lease_of_a_living_process_elsewhere_is_respected(store: Any) -> None:
    client = store[0]
    (version,) = versions_of(store, "elsewhere", 1)
    other = lease.Holder(by="someone@elsewhere", space="elsewhere", pid=2**22 + 1)
    client.create_registered_model(lease.PREFIX + "elsewhere", tags={lease.HOLDER_TAG: other.model_dump_json()})
    with pytest.raises(TransientError, match="someone@elsewhere"):
        registry.promote(client, version)


def test_promotion_decided_against_an_older_champion_is_told_and_moves_nothing(store: Any) -> None:
    client = store[0]
    one, two, three = versions_of(store, "stale", 3)
    registry.promote(client, one)
    registry.promote(client, two)
    with pytest.raises(TransientError, match="version 2 became @champion meanwhile"):
        registry.promote(client, three, expected="1")
    assert pointed(store, "stale") == ("2", "1")


def test_promote_takes_the_challenger_and_says_who(store: Any) -> None:
    client = store[0]
    versions_of(store, "taken", 2)
    found = promotion.promote(client, "taken", None)
    assert found.version == "2"
    assert found.tags["slipway.promoted.by"] == lease.who_am_i()
    assert found.tags["slipway.promoted.at"].endswith("Z")


def test_promote_of_a_refused_version_says_every_objection_and_how_to_force_it(store: Any) -> None:
    client = store[0]
    versions_of(store, "refused", 1, REFUSED, certificate="fails")
    with pytest.raises(GateFailed) as refused:
        promotion.promote(client, "refused", None)
    assert refused.value.exit_code == 3
    assert "score: 0.7, at least 0.8 needed\n  its certificate: fails\n" in refused.value.message
    assert "gain: 0.1" not in refused.value.message
    assert "slipway promote refused 1 --force --reason" in refused.value.message
    assert pointed(store, "refused") == (None, None)


def test_certificate_that_a_gate_refused_is_not_told_twice(store: Any) -> None:
    gate = {"name": "certificate: answers", "passed": False, "detail": "another model is served"}
    (version,) = versions_of(store, "told-once", 1, [gate], certificate="fails")
    assert promotion.objections(version) == ["certificate: answers: another model is served"]


def test_promote_by_force_keeps_who_when_and_why(store: Any) -> None:
    client = store[0]
    versions_of(store, "forced", 1, REFUSED)
    tags = promotion.promote(client, "forced", None, "the demo is at noon").tags
    assert tags["slipway.forced.reason"] == "the demo is at noon"
    assert tags["slipway.forced.by"] == lease.who_am_i()
    assert tags["slipway.forced.at"] == tags["slipway.promoted.at"]
    assert tags[registry.GATES_TAG] == registry.REFUSED


@pytest.mark.parametrize("reason", ["", "  ", "x" * 1001])
def test_reason_that_says_nothing_or_too_much_is_refused(reason: str) -> None:
    with pytest.raises(ConfigError, match="--reason"):
        promotion.checked_reason(reason)


def test_promote_of_a_version_never_gated_is_refused(store: Any) -> None:
    client, _, folder, run_id = store
    registry.register(client, "ungated", folder / "ungated", "d", run_id)
    with pytest.raises(GateFailed, match=r"gates were never evaluated\n  its certificate: there is none"):
        promotion.promote(client, "ungated", "1")


def test_rollback_swaps_champion_and_previous(store: Any) -> None:
    client = store[0]
    one, two = versions_of(store, "back", 2)
    with pytest.raises(RegistryError, match="back@previous"):
        promotion.rollback(client, "back")
    registry.promote(client, one)
    registry.promote(client, two)
    assert promotion.rollback(client, "back").version == "1"
    assert pointed(store, "back") == ("1", "2")
    assert promotion.rollback(client, "back").version == "2"
    assert pointed(store, "back") == ("2", "1")


def test_gates_of_an_earlier_run_do_not_stay_on_the_version(store: Any) -> None:
    client = store[0]
    (version,) = versions_of(store, "regated", 1, REFUSED)
    registry.mark_challenger(client, version, PASSED)
    tags = registry.lookup(client, "regated", "1").tags
    assert {key: value for key, value in tags.items() if key.startswith(registry.GATE_PREFIX)} == {
        "slipway.gate.score": "passed: 0.9, at least 0.8 needed"
    }


def test_gate_with_any_name_and_detail_fits_a_tag(store: Any) -> None:
    client = store[0]
    odd = {"name": "f1 (macro) < 1 // on slice 'é=ü'" + "x" * 300, "passed": True, "detail": "y" * 9000}
    (version,) = versions_of(store, "odd", 1, [odd])
    (key,) = (key for key in version.tags if key.startswith(registry.GATE_PREFIX))
    assert len(key) == 250
    assert key.startswith("slipway.gate.f1 _macro_ _ 1 /_ on slice _é_ü_xxx")
    assert len(version.tags[key]) == 5000
    assert pointed(store, "odd") == (None, None)
    assert registry.resolve(client, "odd", CHALLENGER).version == "1"
