"""Programs as Ray jobs: on a Jobs API of the test's own that runs them as processes, and (slow) on a real Ray of several nodes."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from pydantic import SecretStr

from infra.artifact_store import open_store
from infra.config import Config
from infra.contracts import verify, write_manifest
from infra.errors import ConfigError, SlipwayError, TransientError
from infra.process import Job
from infra.provenance import Provenance
from infra.settings import Settings
from pipelines import runner
from pipelines.display import Display
from pipelines.executors.ray_jobs_api import RayJobs
from pipelines.step import Step, StepContext
from tests.conftest import wait_for
from tests.jobs_api import JobsApi, jobs_api
from tests.ray_nodes import REPOSITORY, TOKEN, RayNodes, ray_nodes

PROGRAM = """
import os, time
from pathlib import Path
from infra.contracts import verify, write_manifest
from infra.errors import ConfigError
from infra.process import Job, Progress, run_program

class CountJob(Job):
    base_dir: Path
    marks: Path
    does: str = "write"

def main(job: CountJob) -> None:
    with (job.marks / "starts").open("a") as starts:
        starts.write(f"{os.environ.get('OMP_NUM_THREADS')}\\n")
    print("counting")
    base = verify(job.base_dir, ("base",))
    Progress(job.progress_file, "lines").report(1, 2)
    if job.does == "fail":
        raise ConfigError("rows.jsonl:3: not JSON")
    if job.does == "crash":
        raise ZeroDivisionError("what a pity")
    alone = job.marks / "running"
    os.close(os.open(alone, os.O_CREAT | os.O_EXCL))  # raises where two run at once
    try:
        while not (job.marks / "go").exists():
            time.sleep(0.05)
    finally:
        alone.unlink()
    job.output_dir.mkdir(parents=True, exist_ok=True)
    (job.output_dir / "text").write_text((job.base_dir / "text").read_text() + "b")
    write_manifest(job.output_dir, "merged", job.provenance, parents={"base": base.digest})

if __name__ == "__main__":
    run_program(CountJob, main)
"""
DRIVER = """
import os, signal, sys
from pathlib import Path
from infra.artifact_store import ArtifactStore
from infra.settings import Settings
from pipelines import store
from pipelines.executors.ray_jobs_api import RayJobs
from pipelines.executors.shipping import Shipment
from tests.integration.test_ray_executor import make

point, home, shared, address, marks = sys.argv[1:]

def dies(owner, name, before):
    whole = getattr(owner, name)
    def cut(*arguments, **named):
        if before:
            os.kill(os.getpid(), signal.SIGKILL)
        whole(*arguments, **named)
        os.kill(os.getpid(), signal.SIGKILL)
    setattr(owner, name, cut)

POINTS = {
    "inputs sent": (Shipment, "send", False), "order sent": (RayJobs, "submit", True), "submitted": (RayJobs, "submit", False),
    "ended": (Shipment, "collect", True), "collected": (store.Slot, "publish", True), "published": (store.Slot, "publish", False),
}
ticks = []
if point in POINTS:
    dies(*POINTS[point])
def on_tick():
    if point == "running" and (Path(marks) / "running").exists():
        os.kill(os.getpid(), signal.SIGKILL)
make(Path(home), shared, address, Path(marks), on_tick)
"""


class Text(Config):
    """Identity of the steps below."""

    text: str


class CountJob(Job):
    """The job of the program above."""

    base_dir: Path
    marks: Path
    does: str = "write"


class Watched(Display):
    """Calls a function whenever the program is looked at."""

    def __init__(self, on_tick: object) -> None:
        super().__init__(quiet=True)
        self._on_tick = on_tick

    def tick(self, progress_file: Path) -> None:
        """Only that."""
        self._on_tick()  # type: ignore[operator]


@dataclass
class Cluster:
    """Where jobs run, and what the tests and the programs tell each other."""

    address: str
    folder: Path
    api: JobsApi | None = None
    nodes: RayNodes | None = None

    @property
    def store_url(self) -> str:
        return (self.folder / "store").as_uri()

    def marks(self, name: str) -> Path:
        """A folder that every program sees, by which it is counted and held."""
        folder = self.folder / "marks" / name
        folder.mkdir(parents=True)
        return folder


@pytest.fixture(scope="module")
def loopback(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("jobs")
    write_program(folder)
    with jobs_api(folder) as api:
        api.token = TOKEN
        yield Cluster(api.address, folder, api=api)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("ray")
    write_program(folder)
    with ray_nodes(folder, (1, 1)) as nodes:
        yield Cluster(nodes.jobs_address, folder, nodes=nodes)


@pytest.fixture(params=["loopback", pytest.param("real", marks=pytest.mark.slow)])
def cluster(request: pytest.FixtureRequest) -> Cluster:
    return request.getfixturevalue(request.param)  # type: ignore[no-any-return]


def write_program(folder: Path) -> None:
    (folder / "programs").mkdir(parents=True)
    (folder / "programs/counted.py").write_text(PROGRAM)


def make(home: Path, store_url: str, address: str, marks: Path, on_tick: object = lambda: None, does: str = "write") -> runner.Outcome:
    """What a driver does: two steps, of which the second is a program on the cluster. `marks` tells tests apart, by the identity too."""

    def write_text(config: Text, context: StepContext) -> None:
        (context.output_dir / "text").write_text(config.text)
        write_manifest(context.output_dir, "base", context.provenance)

    def count(config: Text, context: StepContext) -> None:
        context.run_program("counted", context.job(CountJob, base_dir=context.inputs["base"].path, marks=marks, does=does))

    steps = [
        Step("base", 1, "base", Text(text="a"), write_text),
        Step("merge", 1, "merged", Text(text=marks.name), count, needs={"base": "base"}),
    ]
    where = {"executor": "ray", "ray_jobs_address": address, "ray_token": SecretStr(TOKEN)}
    settings = Settings(home=home, tracking_uri="sqlite:///unused", store=store_url, **where)  # type: ignore[arg-type]
    return runner.run(settings, steps, home / "runs/run", Provenance(), None, Watched(on_tick))


def starts(marks: Path) -> list[str]:
    """One line for each time that the program was started."""
    return (marks / "starts").read_text().splitlines()


def test_step_runs_on_the_cluster_and_its_output_and_log_come_home(cluster: Cluster, tmp_path: Path) -> None:
    marks = cluster.marks(tmp_path.name)
    (marks / "go").touch()
    outcome = make(tmp_path / "home", cluster.store_url, cluster.address, marks)
    made = outcome.artifacts["merge"]
    assert (made.path / "text").read_text() == "ab"
    assert verify(made.path, ("merged",)).parents == {"base": outcome.artifacts["base"].manifest.digest}
    assert "counting" in (tmp_path / "home/runs/run/logs/merge.log").read_text()
    assert starts(marks) == ["None"]  # Ray's OMP_NUM_THREADS=1 is not the program's
    store = open_store(cluster.store_url)
    assert store.find(made.manifest.digest) == made.path.name
    assert store.place.names(f"staging/{made.path.name}") == []
    again = make(tmp_path / "another", cluster.store_url, cluster.address, marks)  # a driver that has nothing but the store
    assert again.skipped == ["base", "merge"]
    assert again.artifacts["merge"].manifest.digest == made.manifest.digest
    assert len(starts(marks)) == 1


@pytest.mark.slow
@pytest.mark.parametrize(("does", "error", "text"), [("fail", ConfigError, r"rows\.jsonl:3"), ("crash", SlipwayError, "what a pity")])
def test_error_of_a_program_on_the_cluster_is_the_driver_s_and_the_next_try_runs_it_again(
    cluster: Cluster, tmp_path: Path, does: str, error: type[SlipwayError], text: str
) -> None:
    marks = cluster.marks(tmp_path.name)
    with pytest.raises(error, match=text) as raised:
        make(tmp_path / "home", cluster.store_url, cluster.address, marks, does=does)
    assert type(raised.value) is error
    (marks / "go").touch()
    assert "merge" in make(tmp_path / "home", cluster.store_url, cluster.address, marks).artifacts
    assert len(starts(marks)) == 2


POINTS = ["inputs sent", "order sent", "submitted", "running", "ended", "collected", "published"]
QUICK = ("running",)


@pytest.mark.parametrize("point", [point if point in QUICK else pytest.param(point, marks=pytest.mark.slow) for point in POINTS])
def test_driver_killed_anywhere_and_started_on_another_machine_ends_with_one_run_of_the_program(
    cluster: Cluster, tmp_path: Path, point: str
) -> None:
    marks = cluster.marks(tmp_path.name)
    if point not in ("submitted", "running"):
        (marks / "go").touch()
    command = [sys.executable, "-c", DRIVER, point, str(tmp_path / "home"), cluster.store_url, cluster.address, str(marks)]
    assert subprocess.run(command, cwd=REPOSITORY, timeout=120, check=False).returncode == -9
    (marks / "go").touch()
    outcome = make(tmp_path / "other", cluster.store_url, cluster.address, marks)
    assert (outcome.artifacts["merge"].path / "text").read_text() == "ab"
    assert len(starts(marks)) == 1


@pytest.mark.slow
def test_two_drivers_at_once_share_one_run_of_the_program(cluster: Cluster, tmp_path: Path) -> None:
    marks = cluster.marks(tmp_path.name)
    outcomes: list[runner.Outcome] = []
    homes = [tmp_path / "one", tmp_path / "two"]
    threads = [
        threading.Thread(target=lambda home=home: outcomes.append(make(home, cluster.store_url, cluster.address, marks))) for home in homes
    ]
    for thread in threads:
        thread.start()
    wait_for(marks / "running", 60)
    (marks / "go").touch()
    for thread in threads:
        thread.join(60)
    assert len({outcome.artifacts["merge"].manifest.digest for outcome in outcomes}) == 1
    assert len(outcomes) == 2
    assert len(starts(marks)) == 1


@pytest.mark.slow
def test_job_stopped_on_the_cluster_can_be_tried_again(loopback: Cluster, tmp_path: Path) -> None:
    marks, api = loopback.marks(tmp_path.name), loopback.api
    assert api is not None

    def stop() -> None:
        if (marks / "running").exists():
            api.stop(api.started[-1])

    with pytest.raises(TransientError, match="was stopped there"):
        make(tmp_path / "home", loopback.store_url, loopback.address, marks, stop)
    (marks / "go").touch()
    assert "merge" in make(tmp_path / "home", loopback.store_url, loopback.address, marks).artifacts


def test_job_whose_machine_is_lost_is_started_again(loopback: Cluster, tmp_path: Path) -> None:
    marks, api = loopback.marks(tmp_path.name), loopback.api
    assert api is not None
    lost: list[str] = []

    def lose() -> None:
        if (marks / "running").exists() and not lost:
            lost.append(api.started[-1])
            api.kill(lost[0])
            (marks / "running").unlink(missing_ok=True)  # what ran there is gone with it
            (marks / "go").touch()

    outcome = make(tmp_path / "home", loopback.store_url, loopback.address, marks, lose)
    assert (outcome.artifacts["merge"].path / "text").read_text() == "ab"
    assert api.started[-2:] == [lost[0], f"{lost[0]}-2"]


def test_cluster_that_asks_for_a_key_or_does_not_answer_is_told_apart(loopback: Cluster, tmp_path: Path) -> None:
    with jobs_api(tmp_path / "api") as api:
        api.token = "right"
        assert RayJobs(api.address, SecretStr("right")).get("none") is None
        with pytest.raises(ConfigError, match="RAY_AUTH_TOKEN"):
            RayJobs(api.address, SecretStr("wrong")).get("none")
    with pytest.raises(TransientError, match="has not answered"):
        RayJobs(api.address, patience_s=0.1).get("none")
    with pytest.raises(ConfigError, match="RAY_API_SERVER_ADDRESS"):
        RayJobs("10.0.0.1:6379")
