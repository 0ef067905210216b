"""The locks of the images: complete, pinned with hashes, and in agreement with what pyproject asks for and with each other."""

from __future__ import annotations

import re
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.images.images import IMAGES, LOCKS, REPOSITORY, Image

LINE = re.compile(r"^(?P<name>[a-z0-9-]+)==(?P<version>\S+) \\\n(?P<hashes>(?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)", re.MULTILINE)
NAMES = sorted({lock for image in IMAGES for lock in image.locks} | {"torch-cuda"})


def locked(name: str) -> dict[str, str]:
    return {found["name"]: found["version"] for found in LINE.finditer((LOCKS / f"{name}.txt").read_text())}


def locked_of(image: Image) -> dict[str, str]:
    return {name: version for lock in image.locks for name, version in locked(lock).items()}


def asked(*extras: str) -> list[Requirement]:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    return [
        Requirement(text)
        for text in [*project["dependencies"], *(text for name in extras for text in project["optional-dependencies"][name])]
    ]


@pytest.mark.parametrize("name", NAMES)
def test_lock_has_a_hash_for_every_line_and_nothing_else(name: str) -> None:
    text = (LOCKS / f"{name}.txt").read_text()
    without_comments = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE)
    assert locked(name)
    assert LINE.sub("", without_comments) == ""


@pytest.mark.parametrize("name", NAMES)
def test_lock_holds_all_that_its_in_file_asks_for(name: str) -> None:
    versions = locked(name)
    lines = [line for line in (LOCKS / f"{name}.in").read_text().splitlines() if line and not line.startswith(("#", "-c "))]
    for requirement in map(Requirement, lines):
        assert requirement.specifier.contains(versions[canonicalize_name(requirement.name)]), requirement


@pytest.mark.parametrize("image", IMAGES, ids=lambda image: image.name)
def test_locks_of_an_image_satisfy_what_the_package_and_its_extras_ask_for(image: Image) -> None:
    versions = locked_of(image)
    for requirement in asked(*image.extras):
        assert requirement.specifier.contains(versions[canonicalize_name(requirement.name)]), requirement


@pytest.mark.parametrize("image", IMAGES, ids=lambda image: image.name)
def test_locks_of_an_image_hold_nothing_that_must_be_absent(image: Image) -> None:
    absent = {canonicalize_name({"sklearn": "scikit-learn", "llama_cpp": "llama-cpp-python"}.get(name, name)) for name in image.absent}
    assert absent.isdisjoint(locked_of(image))


def test_locks_name_one_ray_one_torch_and_the_versions_that_the_tests_run() -> None:
    tested = dict(line.split("==") for line in (LOCKS / "laptop.in").read_text().split() if "==" in line)
    for name in ("train", "serve-cpu", "serve-gpu"):
        assert locked(name)["ray"] == tested["ray"]
    torch = (LOCKS / "torch.txt").read_text().splitlines()[-1]
    assert f"torch=={locked('torch-cpu')['torch']}" == f"torch=={locked('torch-cuda')['torch']}" == torch
    for name in ("train", "serve-cpu", "pipeline", "torch-cuda"):
        both = locked(name).keys() & tested.keys()
        assert {package: locked(name)[package] for package in both} == {package: tested[package] for package in both}
        assert len(both) > 5


def test_locks_of_two_parts_agree_where_both_name_a_package() -> None:
    for torch in ("torch-cpu", "torch-cuda"):
        first, second = locked(torch), locked("train")
        assert all(first[name] == second[name] for name in first.keys() & second.keys())
