"""`python -m training.bench --json`: our loop's speed, memory and loss, and TRL's on the same rows in turn.

Each measurement is a process of its own, so that peak memory is its own; all share model, rows, rank, batch, learning rate and epochs, and
the precision that is the faster one on this machine. Ray is left out on both sides. The last line on stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from infra.contracts import read_manifest
from infra.errors import ConfigError, SlipwayError
from infra.files import read_json, write_json_atomic
from infra.process import peak_rss_bytes
from infra.settings import child_environment, load_settings
from training.config import RenderJob, TrainConfig
from training.data.render import render
from training.data.tokens import read_token_rows

PEER_SCRIPT = Path(__file__).parent / "peers" / "trl_sft.py"
HELDOUT_ROWS = 64
SPEEDS = ("rows_per_s", "tokens_per_s", "supervised_tokens_per_s", "gemm_peak_fraction")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints; the exit code."""
    options = _parser().parse_args(arguments)
    if options.measure:
        write_json_atomic(options.measure[1], measure_ours(read_json(options.measure[0])))
        return 0
    try:
        result = run(options)
    except SlipwayError as error:
        print(error.message, file=sys.stderr)
        return error.exit_code
    print(json.dumps(result))
    return 0


def run(options: argparse.Namespace) -> dict[str, Any]:
    """All measurements, ours and the peer's in turn. Raises ConfigError where inputs or the peer are missing."""
    base_dir, rows_dir = options.base or newest("base"), options.rows or newest("dataset")
    if options.peer and not options.peer_python.exists():
        raise ConfigError(f"--peer-python {options.peer_python}: no such file. A Python with trl installed is needed.")
    with tempfile.TemporaryDirectory(prefix="slipway-bench-") as place:
        tokens_dir = Path(place) / "tokens"
        render(RenderJob(output_dir=tokens_dir, base_dir=base_dir, rows_dir=rows_dir, train_limit_rows=options.train_rows))
        task = make_task(base_dir, rows_dir, tokens_dir, options)
        own, peer = [sys.executable, "-m", "training.bench", "--measure"], [str(options.peer_python), str(PEER_SCRIPT)]
        ours, quantized, peers = [], [], []
        for _ in range(options.repeats):
            ours.append(_measured(own, task, Path(place)))
            quantized.append(_measured(own, {**task, "base_quantization": "nf4"}, Path(place)))
            if options.peer:
                peers.append(_measured(peer, task, Path(place)))
        packed = [_measured(peer, {**task, "packing": True}, Path(place))] if options.peer else []  # once: it takes minutes
    result: dict[str, Any] = {name: _median(ours, name) for name in (*SPEEDS, "peak_rss_bytes", "heldout_loss")}
    result["qlora"] = {
        "ratio": _median(quantized, "rows_per_s") / _median(ours, "rows_per_s"),
        "weights_ratio": _median(quantized, "weights_bytes") / _median(ours, "weights_bytes"),
        "heldout_loss": _median(quantized, "heldout_loss"),
    }
    result |= {"precision": task["precision"], "repeats": options.repeats, "rows_per_s_each": [one["rows_per_s"] for one in ours]}
    rows = len(task["rows"]) * task["epochs"]
    result["peers"] = {name: compare(ours, runs, rows) for name, runs in (("trl", peers), ("trl_packing", packed)) if runs}
    return result


def compare(ours: list[dict[str, Any]], peers: list[dict[str, Any]], rows: float) -> dict[str, Any]:
    """Our rows/s over the peer's, our peak memory over its, and its loss.

    On a busy machine `cpu_ratio`, its processor time over ours, is the fairer of the two speeds.
    """
    speeds = [rows / peer["seconds"] for peer in peers]
    return {
        "ratio": _median(ours, "rows_per_s") / statistics.median(speeds),
        "cpu_ratio": _median(peers, "cpu_s") / _median(ours, "cpu_s"),
        "ratio_each": [one["rows_per_s"] / speed for one, speed in zip(ours, speeds, strict=False)],
        "peak_rss_ratio": _median(ours, "peak_rss_bytes") / _median(peers, "peak_rss_bytes"),
        "rows_per_s": statistics.median(speeds),
        "heldout_loss": _median(peers, "heldout_loss"),
    }


def make_task(base_dir: Path, rows_dir: Path, tokens_dir: Path, options: argparse.Namespace) -> dict[str, Any]:
    """What both sides are told: plain JSON, conversations for the peer and token rows for us."""
    from training.precision import compute_dtype, precision_name
    from training.schedule import total_steps

    config = TrainConfig(batch_rows=options.batch_rows, micro_batch_rows=options.batch_rows, epochs=options.epochs)
    kept = {row.row for row in read_token_rows(tokens_dir, "train")}
    lines = (rows_dir / "train.jsonl").read_text(encoding="utf-8").splitlines()
    messages = [json.loads(lines[index])["messages"] for index in sorted(kept)]
    heldout = read_token_rows(tokens_dir, "heldout")[:HELDOUT_ROWS]
    return {
        "base_dir": str(base_dir),
        "tokens_dir": str(tokens_dir),
        "output_dir": str(tokens_dir.parent / "out"),
        "rows": [{"prompt": each[:-1], "completion": each[-1:]} for each in messages],
        "heldout": [[list(row.ids), [int(mark) for mark in row.supervised]] for row in heldout],
        "precision": precision_name(compute_dtype("auto")),
        "threads": options.threads,
        "rank": config.lora.rank,
        "alpha": config.lora.alpha,
        "target_modules": list(config.lora.target_modules),
        "batch_rows": config.batch_rows,
        "epochs": config.epochs,
        "learning_rate": config.learning_rate,
        "packing": False,
        "base_quantization": "none",
        "warmup_steps": math.ceil(config.warmup_share * total_steps(config, len(messages))),
    }


def measure_ours(task: dict[str, Any]) -> dict[str, Any]:
    """One run of our loop in this process."""
    import torch

    from training.flops import peak_operations_per_s
    from training.loop import Trainer
    from training.model import prepare_model
    from training.precision import compute_dtype

    torch.set_num_threads(task["threads"])
    dtype = compute_dtype(task["precision"])
    config = TrainConfig(
        batch_rows=task["batch_rows"], micro_batch_rows=task["batch_rows"], epochs=task["epochs"], learning_rate=task["learning_rate"],
        base_quantization=task["base_quantization"],
    )  # fmt: skip
    model = prepare_model(Path(task["base_dir"]), config, dtype)
    trainer = Trainer(model, config, read_token_rows(Path(task["tokens_dir"]), "train"))
    peak = peak_operations_per_s(trainer.operations.widest, dtype, trainer.layout.device)
    cpu_started = time.process_time()
    reports = [trainer.train_step() for _ in range(trainer.total_steps)]
    cpu_s = time.process_time() - cpu_started
    peak_bytes = peak_rss_bytes()
    seconds = sum(report.seconds for report in reports)
    return {
        "cpu_s": cpu_s,
        "rows_per_s": sum(report.rows for report in reports) / seconds,
        "tokens_per_s": sum(report.tokens for report in reports) / seconds,
        "supervised_tokens_per_s": sum(report.supervised_tokens for report in reports) / seconds,
        # the first step makes kernels and touches memory for the first time; speeds count it, as the peer's do
        "gemm_peak_fraction": statistics.median(report.operations / report.seconds for report in reports) / peak,
        "peak_rss_bytes": peak_bytes,
        "weights_bytes": model.get_memory_footprint() - sum(each.nbytes for each in model.parameters() if each.requires_grad),
        "heldout_loss": trainer.evaluate(read_token_rows(Path(task["tokens_dir"]), "heldout")[:HELDOUT_ROWS]),
    }


def newest(kind: str) -> Path:
    """The newest artifact of one kind that a run left here. Raises ConfigError where there is none."""
    folder = load_settings().artifacts_dir
    found = [path.parent for path in folder.glob("*/manifest.json") if read_manifest(path.parent).kind == kind]
    if not found:
        raise ConfigError(f"no {kind!r} artifact in {folder}. Run `slipway run` once, or name one with --base and --rows.")
    return max(found, key=lambda path: path.stat().st_mtime)


def _measured(command: list[str], task: dict[str, Any], place: Path) -> dict[str, Any]:
    task_file, result_file = place / "task.json", place / "result.json"
    write_json_atomic(task_file, task)
    result_file.unlink(missing_ok=True)
    done = subprocess.run([*command, str(task_file), str(result_file)], env=child_environment(), capture_output=True, text=True)
    if done.returncode != 0:
        raise ConfigError(f"{command[0]} ended with {done.returncode}: {done.stderr[-1500:]}")
    result: dict[str, Any] = read_json(result_file)
    return result


def _median(results: list[dict[str, Any]], name: str) -> float:
    return float(statistics.median(result[name] for result in results))


def _parser() -> argparse.ArgumentParser:
    import psutil

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object (it is always the last line)")
    parser.add_argument("--base", type=Path, help="folder of a base artifact; the newest one of this machine by default")
    parser.add_argument("--rows", type=Path, help="folder of a dataset artifact; the newest one of this machine by default")
    parser.add_argument("--peer", choices=["trl"], help="measure this trainer too")
    parser.add_argument("--peer-python", type=Path, default=Path(sys.executable), help="Python that has the peer installed")
    parser.add_argument("--train-rows", type=int, default=384)  # of 128 rows a third of our time is the first step
    parser.add_argument("--batch-rows", type=int, default=16)
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--threads", type=int, default=len(psutil.Process().cpu_affinity() or [0]))
    parser.add_argument("--measure", type=Path, nargs=2, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
