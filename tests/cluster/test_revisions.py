"""Revisions of a deployment: how many are kept, two deploys at once, killed ones, and how a revision is stored."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from infra.errors import ArtifactError, ConfigError, TransientError
from infra.lease import Holder
from pipelines.cluster import inventory, revisions
from pipelines.cluster.client import Cluster
from pipelines.cluster.refs import Ref
from tests.cluster.server import Server
from tests.cluster.test_rollout import config_map, job, names, roll_out, states

REPOSITORY = Path(__file__).resolve().parents[2]


def test_no_more_revisions_are_kept_than_can_be_used(cluster: Cluster) -> None:
    for number in range(revisions.KEPT + 2):
        roll_out(cluster, config_map("one", a=str(number)))
    kept = [number for number, _ in states(cluster)]
    assert kept == list(range(3, revisions.KEPT + 3))
    assert states(cluster)[-1][1] == "deployed"


def test_second_deploy_at_once_is_refused_and_a_killed_one_is_taken_over(cluster: Cluster) -> None:
    wanted = inventory.labelled([config_map("one")], "toy")
    pending = revisions.begin(cluster, "toy", "serving", "by another", wanted)
    ref = Ref("v1", "ConfigMap", pending.name)

    def held_by(holder: Holder) -> None:
        cluster.merge(ref, {"metadata": {"annotations": {revisions.HOLDER: holder.model_dump_json()}}})

    held_by(Holder(space="another host", pid=1))
    with pytest.raises(TransientError, match="has been deploying revision 1"):
        roll_out(cluster, config_map("one"))
    held_by(Holder(space="another host", pid=1, since_s=time.time() - 1000))
    assert roll_out(cluster, config_map("one")) == {"one": "created"}
    assert states(cluster) == [(1, "deployed")]  # the same revision, and no second one


def test_killed_deploy_of_other_manifests_is_marked_and_a_new_revision_made(cluster: Cluster) -> None:
    revisions.begin(cluster, "toy", "serving", "cut off", inventory.labelled([config_map("one")], "toy"))
    roll_out(cluster, config_map("two"))
    assert states(cluster) == [(1, "failed"), (2, "deployed")]


def test_revision_whose_answer_was_lost_is_known_as_our_own(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    create = cluster.create

    def create_and_lose_the_answer(manifest: dict[str, Any]) -> dict[str, Any] | None:
        create(manifest)
        return create(manifest)

    monkeypatch.setattr(cluster, "create", create_and_lose_the_answer)
    wanted = inventory.labelled([config_map("one")], "toy")
    assert revisions.begin(cluster, "toy", "serving", "once", wanted).number == 1
    assert states(cluster) == [(1, "pending")]


def test_damaged_revision_is_told_and_too_large_one_refused(cluster: Cluster) -> None:
    broken = config_map("toy-rev-1")
    broken["metadata"]["labels"] = {revisions.OF_LABEL: "toy", revisions.STATE_LABEL: "deployed"}
    cluster.create(broken)
    with pytest.raises(ArtifactError, match="toy-rev-1"):
        revisions.history(cluster, "toy")
    noise = os.urandom(revisions.MAX_CONTENT_BYTES).hex()
    with pytest.raises(ConfigError, match="several parts"):
        revisions.pack([config_map("one", noise=noise)])


def test_equal_manifests_pack_equally_and_come_back_as_they_were() -> None:
    manifests = [config_map("one", text="äöü", b="2")]
    again = [json.loads(json.dumps(copy.deepcopy(manifests[0])))]
    assert revisions.pack(manifests) == revisions.pack(again)
    revision = revisions.Revision("toy", 3, "deployed", "serving", "why", "now", tuple(manifests))
    assert revisions.from_config_map(revisions.to_config_map(revision)) == revision


KILLED = """
import sys
from pathlib import Path
from pipelines.cluster import rollout
from pipelines.cluster.connect import connect
from tests.cluster.test_rollout import config_map, deployment, job
manifests = [config_map("one", a="2"), config_map("two"), deployment("web", "a:2"), job("migrate", "a:2")]
rollout.roll_out(connect(Path(sys.argv[1]), patience_s=5), "toy", "serving", manifests, "test", lambda _: None)
"""


@pytest.mark.slow
def test_deploy_that_is_killed_at_any_request_goes_on_as_the_same_revision(server: Server, cluster: Cluster, tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path / "kubeconfig")]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    roll_out(cluster, config_map("one", a="1"), config_map("old"), job("migrate"))
    num_before = len(server.log)
    num_requests = None
    num_killed = 0
    # Killed at its first write, a few later, and so on, each time further on; the last run is left alone.
    for share in (0.3, 0.5, 0.6, 0.7, 0.8, 0.9, None):
        started = len(server.log)
        process = subprocess.Popen(command, env=environment)
        if share is not None:
            limit = started + int(share * (num_requests or 60))
            while len(server.log) < limit and process.poll() is None:
                time.sleep(0.001)
            if process.poll() is None:
                num_killed += 1
            process.send_signal(signal.SIGKILL)
            process.wait()
        else:
            assert process.wait(60) == 0
        num_requests = num_requests or len(server.log) - started
    assert num_before < len(server.log)
    assert num_killed > 2
    assert {number for number, _ in states(cluster)} == {1, 2}
    assert states(cluster)[-1] == (2, "deployed")
    assert names(cluster) == {"one", "two"}
    assert names(cluster, "Job", "batch/v1") == {"migrate"}
    assert names(cluster, "Deployment", "apps/v1") == {"web"}
