"""KubeRay's definitions, which are not part of this repository."""

from __future__ import annotations

import pytest

from tests.charts.crds import CRDS_VARIABLE, CustomKind, crds_folder, custom_kinds, must_be_here, read_crds


@pytest.fixture(scope="session")
def kuberay() -> dict[tuple[str, str], CustomKind]:
    """KubeRay's kinds; skipped without their definitions, but not in CI, which has them."""
    folder = crds_folder()
    if folder is None and not must_be_here():
        pytest.skip(f"no KubeRay definitions: set {CRDS_VARIABLE} to a folder of them")
    assert folder, f"CI needs KubeRay's definitions: set {CRDS_VARIABLE} to a folder of them"
    return custom_kinds(read_crds(folder))
