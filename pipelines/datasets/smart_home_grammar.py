"""The sentence grammar of a real voice assistant: draws utterances from it, and labels them with its parser.

- Grammar: PyPI `home-assistant-intents` (Apache-2.0), `data/en.json`. Parser: PyPI `hassil`.
- A template is one sentence string of one intent in `en.json`. An utterance drawn from one template is often
  accepted by others too; every one that accepts it is kept in `Row.templates`.
- The label is what `recognize_best` says when it knows the house but not the room of the speaker.
- An utterance is dropped when a reading at least as good has another label, or would have one if the speaker's
  room were known: neither a person nor a model could tell from the words alone.
"""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from hassil import Intents, recognize_all, recognize_best
from hassil.expression import Alternative, Expression, ListReference, Permutation, RuleReference, Sentence, Sequence, TextChunk
from hassil.intents import Intent, IntentData, RangeSlotList, SlotList, TextSlotList, TextSlotValue, WildcardSlotList
from hassil.recognize import RecognizeResult
from hassil.util import normalize_for_matching

from pipelines.datasets.smart_home_house import ALIASES, AREAS, DEVICES, FLOORS, FREE_TEXT, INTENTS, NARROWED_RANGES, UNUSED_LISTS

SPEAKER_AREA = "speaker area"  # stands for a room that the utterance does not mention


@dataclass(frozen=True)
class Template:
    """One sentence string of one intent, and the blocks of `en.json` that hold it."""

    id: str
    intent: str
    sentence: Sentence
    domains: tuple[str, ...]
    """Domains a `{name}` in it may have; empty when it takes none or any."""


@dataclass(frozen=True)
class Row:
    """An utterance and its one label."""

    utterance: str
    intent: str
    answer: str
    """Canonical JSON of the tool call."""
    template: str
    """Id of the template it was drawn from."""
    templates: frozenset[str]
    """Ids of that one and of every template that accepts the utterance, whatever it would say."""
    facts: frozenset[tuple[str, ...]]
    """What must be learnt by example: (intent, slot), and (intent, slot, value) where the words do not hold the value."""


@dataclass(frozen=True)
class Grammar:
    """The parsed grammar, with the house's names in its lists."""

    intents: Intents
    slot_lists: dict[str, SlotList]
    templates: tuple[Template, ...]
    """In the order of `en.json`; those that need the speaker's room are left out."""
    clauses: tuple[frozenset[str], ...]
    """Each: fragments of which a matching utterance holds at least one."""
    blocks: tuple[tuple[str, IntentData, tuple[frozenset[int], ...]], ...]
    """Intent, block, and for each sentence of it the indices of the clauses it requires."""


def load() -> Grammar:
    """The English grammar of the installed `home-assistant-intents`, for the house of `smart_home_house`."""
    data = json.loads(files("home_assistant_intents").joinpath("data/en.json").read_text(encoding="utf-8"))
    intents = Intents.from_dict(data)
    clause_ids: dict[frozenset[str], int] = {}
    blocks = []
    templates: dict[str, Template] = {}
    for name, intent in intents.intents.items():
        for block in intent.data:
            required = []
            for sentence in block.sentences:
                needed = sentence.get_required_clauses({**intents.expansion_rules, **block.expansion_rules})
                required.append(frozenset(clause_ids.setdefault(clause, len(clause_ids)) for clause in needed))
                if (
                    name in INTENTS
                    and not _needs_speaker_area(block)
                    and UNUSED_LISTS.isdisjoint(sentence.list_names(intents.expansion_rules))
                ):
                    _add_template(templates, name, sentence, block)
            blocks.append((name, block, tuple(required)))
    return Grammar(intents, {**intents.slot_lists, **_house_lists()}, tuple(templates.values()), tuple(clause_ids), tuple(blocks))


def draw(grammar: Grammar, template: Template, rng: random.Random) -> str:
    """One utterance of `template`, chosen at random, with single spaces."""
    return " ".join(_expand(grammar, template, template.sentence.expression, rng).split())


def label(grammar: Grammar, utterance: str, template: Template) -> Row | None:
    """The utterance with its label, or None when the parser refuses it, the house cannot do it, or it has more than one meaning."""
    intents = _narrowed(grammar, utterance)
    results = list(recognize_all(utterance, intents, slot_lists=grammar.slot_lists, intent_context={"area": SPEAKER_AREA}))
    best = recognize_best(utterance, _only(intents, results), slot_lists=grammar.slot_lists)
    if best is None or best.intent.name not in INTENTS:
        return None
    answer = _answer(best)
    if any(_rank(result) <= _rank(best) and _answer(result) != answer for result in results):
        return None
    accepting = (template_id(result.intent.name, _text(result.intent_sentence)) for result in results)
    return Row(utterance, best.intent.name, answer, template.id, frozenset((template.id, *accepting)), _facts(best))


def template_id(intent: str, text: str) -> str:
    """A stable id of the sentence string `text` of `intent`, the same for every seed and version that holds it."""
    return f"{intent}:{hashlib.sha256(text.encode()).hexdigest()[:10]}"


def _add_template(templates: dict[str, Template], intent: str, sentence: Sentence, block: IntentData) -> None:
    """Adds a sentence; one that several blocks hold (a cover's and a valve's "close {name}") is one template."""
    key = template_id(intent, _text(sentence))
    before = templates[key].domains if key in templates else ()
    domains = tuple(domain for domain in block.requires_context.get("domain", ()) if domain in DEVICES)
    templates[key] = Template(key, intent, sentence, tuple(dict.fromkeys((*before, *domains))))


def _house_lists() -> dict[str, SlotList]:
    devices = [
        (spoken, name, {"domain": domain})
        for domain, names in DEVICES.items()
        for name in names
        for spoken in (name, *ALIASES.get(name, ()))
    ]
    return {
        "area": TextSlotList.from_strings(AREAS, name="area"),
        "floor": TextSlotList.from_strings(FLOORS, name="floor"),
        "name": TextSlotList.from_tuples(devices, name="name"),
    }


def _expand(grammar: Grammar, template: Template, expression: Expression, rng: random.Random) -> str:
    """The text of one random walk through `expression`."""
    if isinstance(expression, TextChunk):
        return str(expression.original_text)
    if isinstance(expression, ListReference):
        return _list_text(grammar, template, expression.list_name, rng)
    if isinstance(expression, RuleReference):
        return _expand(grammar, template, grammar.intents.expansion_rules[expression.rule_name].expression, rng)
    if isinstance(expression, Alternative):
        return _expand(grammar, template, _branch(expression, rng), rng)
    if isinstance(expression, Permutation):
        return " ".join(_expand(grammar, template, item, rng) for item in rng.sample(expression.items, len(expression.items)))
    if isinstance(expression, Sequence):
        return "".join(_expand(grammar, template, item, rng) for item in expression.items)
    raise TypeError(f"{type(expression).__name__} is not an expression of hassil that this builder knows.")


def _branch(alternative: Alternative, rng: random.Random) -> Expression:
    """One branch: optional words are left out half the time, and the first of several is as likely as all the others.

    The grammar lists the usual word first ("the" before "our", "in" before "throughout"), so rows sound more like people.
    """
    branches = [item for item in alternative.items if not (isinstance(item, TextChunk) and item.is_empty)]
    if len(branches) < len(alternative.items) and rng.random() < 0.5:
        return TextChunk.empty()
    return branches[0] if rng.random() < 0.5 else rng.choice(branches[1:] or branches)


def _list_text(grammar: Grammar, template: Template, list_name: str, rng: random.Random) -> str:
    """A spoken value of the list: numbers in digits, names of a domain that the template takes."""
    values = grammar.slot_lists[list_name]
    if isinstance(values, WildcardSlotList):
        return rng.choice(FREE_TEXT[list_name])
    if isinstance(values, RangeSlotList):
        low, high = NARROWED_RANGES.get(list_name, (values.start, values.stop))
        numbers = [number for number in values.get_numbers() if low <= number <= high]
        return str(rng.choice(numbers))
    assert isinstance(values, TextSlotList), list_name
    fitting = [value for value in values.values if not template.domains or _domain(value) in (None, *template.domains)]
    return _expand(grammar, template, rng.choice(fitting).text_in, rng)


def _domain(value: TextSlotValue) -> str | None:
    return value.context.get("domain") if value.context else None


def _narrowed(grammar: Grammar, utterance: str) -> Intents:
    """The grammar without the blocks that cannot match, for speed; the labels stay the same.

    It drops a block when each sentence of it misses a required fragment: hassil's own first test
    (`recognize_all`), made here once for each distinct clause instead of once for each sentence.
    That test also looks at the utterance without skip words ("please"), so one that holds such words is not narrowed.
    """
    text = normalize_for_matching(utterance).text.casefold()
    if any(word in text for word in grammar.intents.skip_words):
        return grammar.intents
    missed = {number for number, clause in enumerate(grammar.clauses) if not any(fragment in text for fragment in clause)}
    kept = [(name, block) for name, block, required in grammar.blocks if any(map(missed.isdisjoint, required))]
    return _with_blocks(grammar.intents, kept)


def _only(intents: Intents, results: list[RecognizeResult]) -> Intents:
    """`intents` without the blocks that gave none of `results`."""
    giving = {id(result.intent_data) for result in results}
    blocks = [(name, block) for name, intent in intents.intents.items() for block in intent.data if id(block) in giving]
    return _with_blocks(intents, blocks)


def _with_blocks(intents: Intents, blocks: list[tuple[str, IntentData]]) -> Intents:
    chosen: dict[str, Intent] = {}
    for name, block in blocks:
        chosen.setdefault(name, Intent(name)).data.append(block)
    return Intents(intents.language, chosen, intents.slot_lists, intents.expansion_rules, intents.skip_words, intents.settings)


def _needs_speaker_area(block: IntentData) -> bool:
    return "area" in block.requires_context


def _rank(result: RecognizeResult) -> tuple[int, int, int]:
    """How good a reading is, best first: fewest free texts, most literal words, least free text in characters."""
    free = [len(entity.text) for entity in result.entities_list if entity.is_wildcard]
    return len(free), -result.text_chunks_matched, sum(free)


def _answer(result: RecognizeResult) -> str:
    arguments = {name: _plain(entity.value) for name, entity in result.entities.items()}
    # The name stands first: a model writes left to right, and the intent decides which arguments there are.
    call = {"name": result.intent.name, "arguments": dict(sorted(arguments.items()))}
    return json.dumps(call, separators=(",", ":"), ensure_ascii=False)


def _plain(value: Any) -> Any:
    """The value as JSON would have it written: 40 rather than 40.0."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _facts(result: RecognizeResult) -> frozenset[tuple[str, ...]]:
    intent = result.intent.name
    slots = [(intent, name) for name in result.entities]
    unspoken = [(intent, name, str(entity.value)) for name, entity in result.entities.items() if not entity.text]
    return frozenset([(intent,), *slots, *unspoken])


def _text(sentence: Sentence | None) -> str:
    assert sentence is not None, "hassil names the sentence of every result"
    return str(sentence.text)
