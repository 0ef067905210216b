"""Each Dockerfile followed line by line into an empty folder: its lock installed into a fresh venv, its checks run, its entry point asked.

No engine builds images here; `replay.py` says what is real of it.
"""

from __future__ import annotations

import json
import os
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.images.images import IMAGES, REPOSITORY, Image
from tests.images.replay import Replay, follow
from tests.images.test_locks import locked

WALK = """
import importlib, json, pkgutil, sys
def modules(name):
    yield name
    spec = importlib.util.find_spec(name)
    for found in pkgutil.walk_packages(spec.submodule_search_locations or (), name + "."):
        yield found.name
failed = {}
for name in (each for package in json.loads(sys.argv[1]) for each in modules(package) if not each.endswith("__main__")):
    try:
        importlib.import_module(name)
    except ImportError as error:
        failed[name] = str(error)
here = [name for name in json.loads(sys.argv[2]) if importlib.util.find_spec(name)]
print(json.dumps({"failed": failed, "here": here}))
"""


@pytest.fixture(scope="module", params=IMAGES, ids=lambda image: image.name)
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Image, Replay]]:
    """An image and what following it made; gigabytes, so it goes as soon as its tests have run."""
    image: Image = request.param
    if image.name == "serve-gpu" and not os.environ.get("SLIPWAY_TEST_LARGE_IMAGES"):
        pytest.skip("CUDA's libraries and vLLM are 12 GB: `make test-images` follows this one too")
    root = tmp_path_factory.mktemp(image.name)
    yield image, follow(image.file, REPOSITORY, root)
    shutil.rmtree(root)


@pytest.mark.slow
def test_image_when_followed_passes_its_own_checks_and_its_entry_point_tells_the_version(built: tuple[Image, Replay]) -> None:
    _, replay = built
    own = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["version"]
    version = locked("tracking")["mlflow"] if replay.entry_point == ["mlflow"] else own
    assert any("slipway --version" in line for line in replay.ran), "the checks at the end of the Dockerfile"
    done = replay.run([*map(replay.inside, replay.entry_point), "--version"])
    assert (done.returncode, done.stdout.split()[-1:]) == (0, [version]), done.stderr
    assert Path(replay.inside("/opt/slipway/infra/locks")).is_dir()


@pytest.mark.slow
def test_image_when_followed_imports_every_module_that_it_is_for_and_holds_nothing_else(built: tuple[Image, Replay]) -> None:
    image, replay = built
    done = replay.run(
        [replay.inside("/opt/venv/bin/python"), "-W", "ignore", "-c", WALK, json.dumps(image.packages), json.dumps(image.absent)]
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["here"] == []
    unexpected = {name: text for name, text in found["failed"].items() if not name.startswith(tuple(image.unimportable))}
    assert unexpected == {}
    for prefix, needed in image.unimportable.items():
        assert any(name.startswith(prefix) for name in found["failed"]) or not prefix.startswith(image.packages), (
            f"{prefix} imports without {needed}"
        )
