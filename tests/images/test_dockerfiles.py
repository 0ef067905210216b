"""The Dockerfiles: linted by hadolint, and what it does not know of: users, hashes, entry points, nothing floating."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import dockerfile
import pytest

from tests.images.images import FOLDER, IMAGES, REPOSITORY, Image
from tests.images.replay import read

LINTER = shutil.which("hadolint", path=str(Path(sys.executable).parent))
each_image = pytest.mark.parametrize("image", IMAGES, ids=lambda image: image.name)


def lint(path: Path) -> subprocess.CompletedProcess[str]:
    assert LINTER, "hadolint is one of the locked packages; `make install` brings it"
    return subprocess.run([LINTER, "--no-color", "--strict-labels", str(path)], capture_output=True, text=True, check=False)


def last_stage(commands: list[dockerfile.Command]) -> list[dockerfile.Command]:
    return commands[max(index for index, command in enumerate(commands) if command.cmd == "FROM") :]


def only(commands: list[dockerfile.Command], kind: str) -> list[dockerfile.Command]:
    return [command for command in commands if command.cmd == kind]


def test_images_are_those_that_the_tests_know() -> None:
    assert {path.name for path in FOLDER.glob("*Dockerfile*")} == {image.file.name for image in IMAGES}


@each_image
def test_dockerfile_passes_hadolint(image: Image) -> None:
    done = lint(image.file)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("old", "new", "rule"),
    [
        ("python:3.11.14-slim-bookworm", "python:latest", "DL3007"),
        ("# hadolint ignore=DL3008\n", "", "DL3008"),
        ('ENTRYPOINT ["python", "-m", "serving.app"]', "ENTRYPOINT python -m serving.app", "DL3025"),
        ("USER 10001:10001", "USER root", "DL3002"),
    ],
)
def test_dockerfile_that_is_broken_is_refused_by_hadolint(tmp_path: Path, old: str, new: str, rule: str) -> None:
    text = (FOLDER / "serve-cpu.Dockerfile").read_text()
    assert old in text
    broken = tmp_path / "Dockerfile"
    broken.write_text(text.replace(old, new).replace("FROM ${PYTHON_IMAGE}", f"FROM {new}" if "latest" in new else "FROM ${PYTHON_IMAGE}"))
    assert rule in lint(broken).stdout


@each_image
def test_image_runs_as_a_user_by_number_and_by_an_entry_point_without_a_shell(image: Image) -> None:
    stage = last_stage(read(image.file))
    (user,) = only(stage, "USER")
    assert all(part.isdigit() and int(part) >= 10000 for part in user.value[0].split(":"))
    (entry_point,), (command,) = only(stage, "ENTRYPOINT"), only(stage, "CMD")
    assert entry_point.json
    assert command.json
    assert stage.index(user) < stage.index(only(stage, "RUN")[-1]) < stage.index(entry_point)


@each_image
def test_image_has_a_health_check_exactly_where_it_serves(image: Image) -> None:
    stage = last_stage(read(image.file))
    assert len(only(stage, "HEALTHCHECK")) == len(only(stage, "EXPOSE")) == int(image.serves)


@each_image
def test_image_installs_only_from_locks_with_hashes_in_a_stage_that_is_left_behind(image: Image) -> None:
    commands = read(image.file)
    last = last_stage(commands)
    assert not any("pip " in command.value[0] for command in only(last, "RUN"))
    installs = [
        part
        for command in only(commands, "RUN")
        for part in command.value[0].split("&&")
        if "pip install" in part or "pip download" in part
    ]
    assert len(installs) >= 2
    for part in installs:
        assert "--no-deps" in part
        assert "--require-hashes" in part or "--editable /opt/slipway" in part
    named = [word for part in installs for word in part.split() if word.startswith("/opt/locks/")]
    assert {word.removeprefix("/opt/locks/").replace("${TORCH}", "torch-cpu") for word in named} == {f"{lock}.txt" for lock in image.locks}


@each_image
def test_image_copies_what_the_context_holds_and_no_more(image: Image) -> None:
    allowed = [line.removeprefix("!") for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    copies = [command for command in only(read(image.file), "COPY") if not command.flags]
    for source in (source for command in copies for source in command.value[:-1]):
        assert source.split("/")[0] in allowed
        assert (REPOSITORY / source.replace("${TORCH}", "torch-cpu")).exists(), source
