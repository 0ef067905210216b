"""The model card: what a version is, what it was made from and what was proven of it, as Markdown and as a page of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from infra.files import write_text_atomic
from infra.registry import MAX_DESCRIPTION_CHARS
from pipelines.spec import Spec

MARKDOWN_NAME = "model-card.md"
PAGE_NAME = "model-card.html"
Cells = tuple[str, ...]


@dataclass(frozen=True)
class Section:
    """One heading with text, a table or a command below it."""

    title: str
    text: str = ""
    header: Cells = ()
    rows: tuple[Cells, ...] = ()
    code: str = ""


def sections(spec: Spec, report: Mapping[str, Any], lineage: Mapping[str, str], served_format: str) -> list[Section]:
    """The card of the version that `report` tells of, the most wanted first: a registry may show only the beginning."""
    gates = tuple((gate["name"], "pass" if gate["passed"] else "refused", gate["detail"]) for gate in report["gates"])
    how = "fully fine-tuned" if spec.train.method == "full" else f"fine-tuned with {spec.train.method}"
    what = (
        f"{spec.base_model}, {how} on {_dataset(spec)} and kept as {served_format} weights. Run {report['run_id']} made it; "
        f"artifact {report['model']['digest']}."
    )
    return [
        Section("What it is", what),
        Section("Gates", header=("gate", "outcome", "measured"), rows=gates),
        Section("Scores on held-out rows", "Each with its interval.", ("metric", "rows", *report["scores"]), _scores(report["scores"])),
        *_candidates(report.get("candidates")),
        Section("How to serve", code=f"slipway serve {spec.name}@champion\nslipway chat 'your question'"),
        Section("Certificate", *_certificate(report["parity"])),
        Section("Data", "What training read, and what it lost.", ("split", "rows read", "kept", "tokens", "learned"), _receipt(report)),
        Section("Training", header=("figure", "value"), rows=_training(spec, report["training"])),
        Section("Made from", "Content digests, sha256.", ("what", "digest"), tuple(lineage.items())),
    ]


def write(title: str, parts: Sequence[Section], folder: Path) -> list[Path]:
    """Writes the card as Markdown and as a page; gives both paths."""
    for name in (MARKDOWN_NAME, PAGE_NAME):
        write_text_atomic(folder / name, _render(name, title, parts))
    return [folder / MARKDOWN_NAME, folder / PAGE_NAME]


def description(title: str, parts: Sequence[Section], run_id: str) -> str:
    """The card in Markdown with as many whole sections as a registry's description can hold, and where the rest is."""
    whole = _render(MARKDOWN_NAME, title, parts)
    if len(whole) <= MAX_DESCRIPTION_CHARS:
        return whole
    ending = f"\nShortened: all of it is {MARKDOWN_NAME} of run {run_id}.\n"
    kept = list(parts)
    while kept and len(_render(MARKDOWN_NAME, title, kept)) > MAX_DESCRIPTION_CHARS - len(ending):
        kept.pop()
    return _render(MARKDOWN_NAME, title, kept) + ending


def _render(template: str, title: str, parts: Sequence[Section]) -> str:
    """Autoescaped in both: a registry shows Markdown as a page, and names of gates and slices come from data."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    environment.filters["cell"] = lambda text: " ".join(text.replace("|", "/").split())
    source = Path(__file__).with_name(template).read_text(encoding="utf-8")
    return environment.from_string(source).render(title=title, parts=parts)


def _dataset(spec: Spec) -> str:
    return spec.dataset.type if spec.dataset.type != "files" else ", ".join(Path(source.path).name for source in spec.dataset.train)


def _scores(scores: Mapping[str, Any]) -> tuple[Cells, ...]:
    names = dict.fromkeys(metric for by_metric in scores.values() for metric in by_metric)
    rows = []
    for name in names:
        found = [by_metric.get(name) for by_metric in scores.values()]
        n = next(score["n"] for score in found if score)
        rows.append((name, f"{n:g}", *(f"{it['value']:.3f} ({it['low']:.3f} to {it['high']:.3f})" if it else "-" for it in found)))
    return tuple(rows)


def _candidates(choice: Mapping[str, Any] | None) -> list[Section]:
    """What the weight formats cost and bring, where there was a choice."""
    if choice is None or len(choice["candidates"]) < 2:
        return []
    rows = tuple(
        (each["format"], f"{each['bytes'] / 1e6:.0f}", f"{each['tokens_per_s']:.0f}", each["why"]) for each in choice["candidates"]
    )
    return [Section("Candidates", header=("format", "MB", "tokens/s", "why chosen or not"), rows=rows)]


def _certificate(parity: Mapping[str, Any]) -> tuple[str, Cells, tuple[Cells, ...]]:
    """Text, header and rows."""
    rows = tuple(
        (
            model,
            f"{found['same_answer']['value']:.3f} of {found['same_answer']['n']:g}",
            "{value:+.3f} ({low:+.3f} to {high:+.3f})".format(**found["score_change"]),
        )
        for model, found in parity["models"].items()
        if "same_answer" in found
    )
    return f"Compared with {parity['reference']}, row by row.", ("model", "rows answered alike", "change of score"), rows


def _receipt(report: Mapping[str, Any]) -> tuple[Cells, ...]:
    keys = ("rows_read", "rows_kept", "tokens_kept", "tokens_supervised")
    return tuple((split, *(str(found[key]) for key in keys)) for split, found in report["receipt"].items() if isinstance(found, Mapping))


def _training(spec: Spec, figures: Mapping[str, Any]) -> tuple[Cells, ...]:
    train = spec.train
    chosen = {"learning rate": f"{train.learning_rate:g}", "epochs": f"{train.epochs:g}", "batch, rows": str(train.batch_rows)}
    if train.method != "full":
        chosen |= {"LoRA rank": str(train.lora.rank), "LoRA alpha": f"{train.lora.alpha:g}"}
    measured = {"steps": "steps", "loss": "final_loss", "held-out loss": "final_heldout_loss", "rows/s": "rows_per_s", "seconds": "seconds"}
    found = {name: _figure(figures[key]) for name, key in measured.items() if figures.get(key) is not None}
    return tuple((chosen | {"precision": str(figures["precision"])} | found).items())


def _figure(value: float) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
