"""`python -m infra.remote --store URL --job NAME --module M`: runs one of our programs for a driver on another machine.

It fetches the order and all that the order names, runs the very program that a laptop runs, in a home of this machine, tells its progress
while it runs, and pushes what it made and then the result. Run again after it was killed, it does the same; after it ended well, nothing.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
from collections import deque
from pathlib import Path
from typing import Any, NoReturn

from infra import child, orders
from infra.artifact_store import ArtifactStore, open_store
from infra.contracts import MANIFEST_NAME
from infra.errors import EXIT_DONE, EXIT_INTERRUPTED, ArtifactError, SlipwayError
from infra.files import write_json_atomic
from infra.mirror import mirrored
from infra.orders import KnownError, Order, Result, beside
from infra.process import error_file, read_error
from infra.settings import load_settings

LOG_TAIL_LINES = 15
SLOT_OUTPUT = "output"


def main(arguments: list[str] | None = None) -> int:
    """The exit code of the program, or of the known error that kept it from running."""
    parser = argparse.ArgumentParser(description="Runs a program of Slipway for a driver on another machine.")
    parser.add_argument("--store", required=True, help="fsspec URL of the artifact store, as the driver's SLIPWAY_STORE")
    parser.add_argument("--job", required=True, help="name of the order in the store, staging/<slot>/config.json")
    parser.add_argument("--module", required=True, help="program to run, for example training.finetune")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        return run_order(open_store(options.store), options.job, options.module, load_settings().home)
    except SlipwayError as error:
        print(error.message, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def run_order(store: ArtifactStore, name: str, module: str, home: Path) -> int:
    """Runs the order to its end and leaves its result; the exit code. Raises ArtifactError where there is no such order."""
    order = orders.read(store, name, Order)
    if order is None or order.module != module:
        found = f"an order for {order.module}" if order else "none"
        raise ArtifactError(
            f"{store.place.url}/{name}: an order for {module} is needed, found {found}. The driver writes it: run its command."
        )
    before = orders.read(store, beside(name, "result.json"), Result)
    if before is not None and before.exit_code == EXIT_DONE:
        print(f"{name} was done already")
        return EXIT_DONE
    for suffix in ("progress.jsonl", "stop", "failure.json", "worker.json"):
        store.place.remove(beside(name, suffix))
    try:
        job = orders.arrive(store, order, home)
    except SlipwayError as error:
        known = KnownError(type=type(error).__name__, message=error.message)
        orders.write(store, beside(name, "result.json"), Result(exit_code=error.exit_code, error=known))
        raise
    job["remote"] = {"store": store.place.url, "order": name}
    config_file = orders.inside(home, name)
    write_json_atomic(config_file, job)
    progress_file = Path(job["progress_file"]) if job.get("progress_file") else None
    with mirrored(store, (progress_file, beside(name, "progress.jsonl"))):
        exit_code, log_tail = run_child(module, config_file)
    orders.write(store, beside(name, "result.json"), make_result(store, job, home, exit_code, log_tail, config_file))
    return exit_code if exit_code >= 0 else 128 - exit_code


def run_child(module: str, config_file: Path) -> tuple[int, str]:
    """Exit code and end of the log of the program, whose output is passed on; stopped with us."""
    error_file(config_file).unlink(missing_ok=True)
    lines: deque[str] = deque(maxlen=LOG_TAIL_LINES)
    process = child.start_module(module, ["--config", str(config_file)], subprocess.PIPE)
    assert process.stdout is not None
    try:
        for line in process.stdout:
            text = line.decode(errors="replace")
            sys.stdout.write(text)
            sys.stdout.flush()
            lines.append(text)
        process.wait()
    finally:
        child.stop(process)
        process.stdout.close()
    return process.returncode, "".join(lines)


def make_result(store: ArtifactStore, job: dict[str, Any], home: Path, exit_code: int, log_tail: str, config_file: Path) -> Result:
    """What the program made, pushed: a slot's whole output as the artifact that it is, anything else file by file."""
    known = read_error(config_file)
    error = KnownError(type=type(known).__name__, message=known.message) if known else None
    unsent = (job.get("tracking") or {}).get("unsent_file")
    files = orders.pushed_files(store, home, Path(unsent) if unsent else None)
    if exit_code != EXIT_DONE:
        return Result(exit_code=exit_code, error=error, log_tail=log_tail, files=files)
    output_dir, name = Path(job["output_dir"]), None
    if output_dir.name == SLOT_OUTPUT and (output_dir / MANIFEST_NAME).is_file():
        name = output_dir.parent.name
        store.push(output_dir, name)
    else:
        files |= orders.pushed_files(store, home, output_dir)
    shutil.rmtree(output_dir, ignore_errors=True)  # it would fill the node's disk, one model after the other
    return Result(exit_code=exit_code, artifact=name, files=files)


def _interrupt(_signal: int, _frame: Any) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    exit_code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)  # threads of an object store's client can abort the interpreter's own end: 134 after a good result, 1 of 14 jobs
