"""What the commands are asked for, named once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

SpecPath = Annotated[Path, typer.Argument(help="The spec file (YAML).")]
Model = Annotated[str, typer.Argument(metavar="MODEL", help="A spec file, NAME@ALIAS of a registered model, or a model's folder.")]
Registered = Annotated[str, typer.Argument(metavar="SPEC|NAME", help="A spec file, or the name of a registered model.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", metavar="A.B=VALUE", help="Change one key of the spec; may be repeated.")]
KeyFile = Annotated[Path | None, typer.Option("--file", help="File of the keys; api_keys.json in SLIPWAY_HOME where absent.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress, only results and errors.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, all else on stderr.")]
Executor = Annotated[
    str | None, typer.Option("--executor", metavar="local|ray|kubernetes", help="Where programs run; absent: SLIPWAY_EXECUTOR, or here.")
]
