"""A real dataset, utterance -> one JSON tool call, from the grammar and the parser of a voice assistant.

- Rows are drawn from the sentence templates of `home-assistant-intents` and labelled by `hassil`
  (see `smart_home_grammar`, which says what a template is and which utterances are too ambiguous to keep).
- Training and held-out rows share no utterance, compared in lower case with single spaces.
- An `unseen_template` row is one that no template of the training rows accepts: neither the template it was drawn
  from, nor the one the parser chose, nor any other that would parse its words. So it is no training row
  with an optional word added. Its intent, slots and unspoken values do occur in training, through other templates.
- A `seen_template` row has its template among the training rows.
- Templates are held out at random within each intent, before any row is drawn.
- The same options and the same versions of the two packages give the same bytes.
"""

from __future__ import annotations

import heapq
import json
import random
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from infra.errors import ConfigError
from pipelines.datasets.options import SmartHomeOptions

if TYPE_CHECKING:
    from pipelines.datasets.smart_home_grammar import Grammar, Row, Template

__all__ = ["SYSTEM", "SmartHomeOptions", "build", "draw_rows", "normalised"]

SYSTEM = "Answer with one JSON tool call."

HELD_OUT_TEMPLATE_SHARE = 0.2
MIN_TEMPLATES_TO_HOLD_OUT = 3  # an intent with fewer keeps them all for training
MAX_INTENT_SHARE = 0.25  # of the rows of one draw
MAX_TEMPLATE_SHARE = 0.01  # of the rows of one draw
MIN_CAP_ROWS = 8
TRIES_PER_ROW = 8


def build(options: SmartHomeOptions, output_dir: Path) -> None:
    """Writes train.jsonl and heldout.jsonl into `output_dir`, which is made if need be.

    Raises:
        ConfigError: fewer rows exist than asked, or the two packages are not installed.
    """
    grammar = _load_grammar()
    rng = random.Random(options.seed)
    num_unseen = round(options.heldout_rows * options.unseen_share)
    held_out = _hold_out(grammar.templates, rng) if num_unseen else frozenset()
    used: set[str] = set()

    def sample(name: str, templates: Iterable[Template], count: int, accept: Callable[[Row], bool]) -> list[Row]:
        rows = draw_rows(grammar, list(templates), count, rng, used, accept)
        if len(rows) < count:
            raise ConfigError(_too_few(name, len(rows), count))
        return rows

    open_templates = [template for template in grammar.templates if template.id not in held_out]
    train = sample("training", open_templates, options.train_rows, lambda row: not row.templates & held_out)
    drawn_from = {row.template for row in train}
    seen_templates = [template for template in open_templates if template.id in drawn_from]
    seen = sample("seen_template", seen_templates, options.heldout_rows - num_unseen, lambda row: not row.templates & held_out)
    touched = frozenset[str]().union(*(row.templates for row in train))
    learnt = frozenset[tuple[str, ...]]().union(*(row.facts for row in train))
    held_templates = [template for template in grammar.templates if template.id in held_out]
    unseen = sample("unseen_template", held_templates, num_unseen, lambda row: not row.templates & touched and row.facts <= learnt)
    output_dir.mkdir(parents=True, exist_ok=True)
    _write(output_dir / "train.jsonl", [_line(row) for row in _every_template_first(rng.sample(train, len(train)))])
    slices = (("seen_template", seen), ("unseen_template", unseen))
    heldout = [_line(row) | {"slice": name} for name, rows in slices for row in rows]
    _write(output_dir / "heldout.jsonl", rng.sample(heldout, len(heldout)))


def normalised(utterance: str) -> str:
    """The utterance as compared between the splits: lower case, single spaces."""
    return " ".join(utterance.casefold().split())


def _load_grammar() -> Grammar:
    try:
        from pipelines.datasets.smart_home_grammar import load
    except ImportError as error:
        raise ConfigError(
            f"{error}. The smart-home dataset needs hassil and home-assistant-intents: pip install 'slipway-ml[demo]'"
        ) from error
    return load()


def _hold_out(templates: Sequence[Template], rng: random.Random) -> frozenset[str]:
    """Ids of the templates kept out of training: a random share of each intent's, at least one where it has three."""
    held: list[str] = []
    for own in _by_intent(templates).values():
        if len(own) >= MIN_TEMPLATES_TO_HOLD_OUT:
            held += [template.id for template in rng.sample(own, max(1, round(HELD_OUT_TEMPLATE_SHARE * len(own))))]
    return frozenset(held)


def draw_rows(
    grammar: Grammar, templates: list[Template], count: int, rng: random.Random, used: set[str], accept: Callable[[Row], bool]
) -> list[Row]:
    """Up to `count` new rows; adds their utterances to `used`.

    Intents take turns in proportion to the square root of their number of templates, so that a rare intent counts
    and a rich one is still covered; within an intent its templates take turns. Both are capped. A template that gives
    no new row in TRIES_PER_ROW draws is left.
    """
    turns = {intent: deque(rng.sample(own, len(own))) for intent, own in _by_intent(templates).items()}
    weight = {intent: len(own) ** 0.5 for intent, own in turns.items()}
    intent_cap = max(MIN_CAP_ROWS, int(MAX_INTENT_SHARE * count))
    template_cap = max(MIN_CAP_ROWS, int(MAX_TEMPLATE_SHARE * count))
    taken: Counter[str] = Counter()
    rows: list[Row] = []
    queue = [(0.0, intent) for intent in turns]
    while queue and len(rows) < count:
        _, intent = heapq.heappop(queue)
        template = turns[intent].popleft()
        row = _new_row(grammar, template, rng, used, accept)
        if row is not None:
            rows.append(row)
            taken.update((template.id, intent))
            if taken[template.id] < template_cap:
                turns[intent].append(template)
        if turns[intent] and taken[intent] < intent_cap:
            heapq.heappush(queue, (taken[intent] / weight[intent], intent))
    return rows


def _new_row(grammar: Grammar, template: Template, rng: random.Random, used: set[str], accept: Callable[[Row], bool]) -> Row | None:
    from pipelines.datasets.smart_home_grammar import draw, label

    for _ in range(TRIES_PER_ROW):
        utterance = draw(grammar, template, rng)
        if normalised(utterance) in used:
            continue
        row = label(grammar, utterance, template)
        if row is not None and accept(row):
            used.add(normalised(utterance))
            return row
    return None


def _by_intent(templates: Iterable[Template]) -> dict[str, list[Template]]:
    grouped: dict[str, list[Template]] = {}
    for template in templates:
        grouped.setdefault(template.intent, []).append(template)
    return grouped


def _line(row: Row) -> dict[str, object]:
    messages = [("system", SYSTEM), ("user", row.utterance), ("assistant", row.answer)]
    return {"messages": [{"role": role, "content": content} for role, content in messages], "template": row.template}


def _every_template_first(rows: Sequence[Row]) -> list[Row]:
    """The rows with one of each template at the front, so that a run on the first part of them still sees every template."""
    first: dict[str, Row] = {}
    rest = [row for row in rows if first.setdefault(row.template, row) is not row]
    return [*first.values(), *rest]


def _write(path: Path, lines: Sequence[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8", newline="\n")


def _too_few(name: str, found: int, needed: int) -> str:
    remedy = {
        "training": "Lower train_rows, or add names to pipelines/datasets/smart_home_house.py.",
        "seen_template": "Lower heldout_rows, raise unseen_share, or raise train_rows so that more templates are seen.",
        "unseen_template": "Lower heldout_rows or unseen_share, or raise train_rows so that more slots are learnt.",
    }[name]
    return f"Found {found} distinct {name} rows; {needed} are needed. {remedy}"
