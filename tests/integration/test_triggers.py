"""The CI files' own shell steps, run as GitHub and GitLab run them: exit codes passed on, the report kept, the score table commented."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

REPOSITORY = Path(__file__).parents[2]
GITHUB_FILE = REPOSITORY / ".github" / "workflows" / "pipeline.yaml"
GITLAB_FILE = REPOSITORY / "ci" / "gitlab.yml"
GH = '#!/bin/sh\nprintf "%s\\n" "$@" >"$GH_CALLS"\nfor word; do case "$word" in body=@*) cat "${word#body=@}" >>"$GH_CALLS" ;; esac; done\n'


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with this environment as its `.venv`, which is what `make install` leaves in a checkout."""
    (tmp_path / ".venv").symlink_to(sys.prefix)
    return tmp_path


@pytest.fixture
def github(checkout: Path) -> dict[str, str]:
    """What GitHub gives to every step, with a `gh` that writes down what it is asked to do."""
    program = checkout / "bin" / "gh"
    program.parent.mkdir()
    program.write_text(GH)
    program.chmod(0o755)
    files = {name: str(checkout / name.lower()) for name in ("GITHUB_ENV", "GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY", "GH_CALLS")}
    path = f"{program.parent}{os.pathsep}{os.environ['PATH']}"
    others = {"RUNNER_TEMP": str(checkout), "GITHUB_REPOSITORY": "yard/cranes", "GITHUB_SHA": "c0ffee", "GH_TOKEN": "t", "PATH": path}
    return dict.fromkeys(workflow()["jobs"]["run"]["env"], "") | files | others


@pytest.fixture
def gitlab_api() -> Iterator[tuple[str, list[tuple[str, str, str]]]]:
    """The address of a server in GitLab's place, and what it was sent: path, token, body."""
    calls: list[tuple[str, str, str]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            calls.append((self.path, self.headers["PRIVATE-TOKEN"], body))
            self.send_response(201)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing on stderr."""

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", calls
        server.shutdown()
        thread.join()


def workflow() -> dict[Any, Any]:
    """The workflow's document; YAML 1.1 reads its key `on` as true."""
    return dict(yaml.safe_load(GITHUB_FILE.read_text()))


def step(job: str, name: str) -> str:
    """The shell text of a step, by its id."""
    return str(next(each["run"] for each in workflow()["jobs"][job]["steps"] if each.get("id") == name))


def shell(text: str, folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Runs it as GitHub does by default: bash that stops at the first error."""
    whole = {**os.environ, "PYTHONPATH": str(REPOSITORY), **environment}
    return subprocess.run(["bash", "-e", "-c", text], cwd=folder, env=whole, capture_output=True, text=True, timeout=300, check=False)


def test_github_triggers_are_push_schedule_and_by_hand() -> None:
    triggers = workflow()[True]
    assert set(triggers) == {"push", "schedule", "workflow_dispatch"}
    spec = triggers["workflow_dispatch"]["inputs"]["spec"]["default"]
    assert (REPOSITORY / spec).is_file()
    assert spec in workflow()["jobs"]["run"]["env"]["SPEC"]


def test_github_steps_take_what_others_wrote_from_the_environment_alone() -> None:
    document = workflow()
    texts = [each["run"] for job in document["jobs"].values() for each in job["steps"] if "run" in each]
    assert len(texts) == 4
    assert not [text for text in texts if "${{" in text], "an expression in a shell text is a way in"
    assert document["permissions"] == {"contents": "read"}
    upload = next(each for each in document["jobs"]["run"]["steps"] if "upload-artifact" in each.get("uses", ""))
    assert upload["if"] == "always()"


@pytest.mark.parametrize("text", [step("run", "install"), yaml.safe_load(GITLAB_FILE.read_text())["slipway"]["before_script"][0]])
def test_install_step_names_a_target_that_makes_the_environment(text: str) -> None:
    done = shell(text, REPOSITORY, {"MAKEFLAGS": "-n"})
    assert done.returncode == 0, done.stderr
    assert shell("make no-such-target", REPOSITORY, {"MAKEFLAGS": "-n"}).returncode != 0


def test_github_secrets_become_files_that_only_the_runner_reads(checkout: Path, github: dict[str, str]) -> None:
    done = shell(step("run", "secrets"), checkout, {**github, "KUBECONFIG_TEXT": "kind: Config"})
    assert done.returncode == 0, done.stderr
    name, _, path = Path(github["GITHUB_ENV"]).read_text().strip().partition("=")
    assert (name, Path(path).read_text(), Path(path).stat().st_mode & 0o077) == ("KUBECONFIG", "kind: Config\n", 0)


def test_github_run_that_promotes_keeps_report_and_comments_scores(
    report: dict[str, Any], toy_spec: Path, home: Path, checkout: Path, github: dict[str, str]
) -> None:
    done = shell(step("run", "run"), checkout, {**github, "SPEC": str(toy_spec), "SLIPWAY_HOME": str(home)})
    assert done.returncode == 0, done.stderr
    assert Path(github["GITHUB_OUTPUT"]).read_text() == "exit_code=0\n"
    assert "<title>toy version 1</title>" in (checkout / "pipeline-report" / "report.html").read_text()
    summary = Path(github["GITHUB_STEP_SUMMARY"]).read_text()
    score = report["scores"]["adapter"]["exact_match_json"]
    assert f"| {score['value']:.3f} ({score['low']:.3f} to {score['high']:.3f}) |" in summary
    assert "### toy: version 1 is `@champion`" in summary
    done = shell(step("comment", "comment"), checkout, github)
    assert done.returncode == 0, done.stderr
    asked = Path(github["GH_CALLS"]).read_text()
    assert "repos/yard/cranes/commits/c0ffee/comments" in asked
    assert summary in asked


def test_github_run_of_a_bad_spec_ends_with_2_and_says_why(checkout: Path, github: dict[str, str]) -> None:
    (checkout / "bad.yaml").write_text("name: bad\nbase_modle: x\n")
    (checkout / "pipeline-report").mkdir()
    (checkout / "pipeline-report" / "report.html").write_text("of an earlier run")
    done = shell(step("run", "run"), checkout, {**github, "SPEC": "bad.yaml", "CHANGE": "train.epochs=2"})
    assert done.returncode == 2
    assert Path(github["GITHUB_OUTPUT"]).read_text() == "exit_code=2\n"
    summary = Path(github["GITHUB_STEP_SUMMARY"]).read_text()
    assert "### bad: bad input (exit 2)" in summary
    assert "did you mean &#x27;base_model&#x27;?" in summary
    assert not (checkout / "pipeline-report" / "report.html").exists(), "an old report passed for a new one"


def test_gitlab_run_that_a_gate_refuses_ends_with_3_and_comments_the_gates(
    report: dict[str, Any], toy_spec: Path, home: Path, checkout: Path, gitlab_api: tuple[str, list[tuple[str, str, str]]]
) -> None:
    job = yaml.safe_load(GITLAB_FILE.read_text())["slipway"]
    url, calls = gitlab_api
    change = f"quantize.choose={report['candidates']['selected']}"  # which is cheapest depends on how busy this machine is
    spec = yaml.safe_load(toy_spec.read_text())
    strict = toy_spec.with_name("strict.yaml")
    strict.write_text(yaml.safe_dump({**spec, "gates": {**spec["gates"], "min_score": 1}}))
    given = {"SPEC": str(strict), "CHANGE": change, "SLIPWAY_HOME": str(home), "SLIPWAY_COMMENT_TOKEN": "token"}
    given |= {"CI_API_V4_URL": url, "CI_PROJECT_ID": "7", "CI_COMMIT_SHA": "c0ffee"}
    done = shell("\n".join(job["script"]), checkout, given)
    assert done.returncode == 3, done.stderr
    assert (checkout / "pipeline-report" / "report.html").is_file()
    done = shell("\n".join(job["after_script"]), checkout, given)
    assert done.returncode == 0, done.stderr
    ((path, token, body),) = calls
    assert (path, token) == ("/projects/7/repository/commits/c0ffee/comments", "token")
    assert 'name="note"' in body
    assert "### strict: refused (exit 3)" in body
    assert "| 0.000, at least 1.000 needed: 1.000 too low" in body
    assert shell("\n".join(job["after_script"]), checkout, {**given, "SLIPWAY_COMMENT_TOKEN": ""}).returncode == 0
    assert len(calls) == 1, "without a token nothing is sent"


def test_gitlab_job_runs_on_push_schedule_and_by_hand_and_keeps_the_report_always() -> None:
    job = yaml.safe_load(GITLAB_FILE.read_text())["slipway"]
    conditions = " ".join(rule["if"] for rule in job["rules"])
    assert all(f'"{source}"' in conditions for source in ("push", "schedule", "web"))
    assert (job["artifacts"]["when"], job["artifacts"]["paths"]) == ("always", ["pipeline-report"])
    assert job["retry"]["exit_codes"] == [75]
