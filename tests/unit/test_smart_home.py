from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("hassil")
pytest.importorskip("home_assistant_intents")

from hassil import recognize_all, recognize_best

from infra.errors import ConfigError
from pipelines.datasets import smart_home_grammar as grammar_module
from pipelines.datasets.smart_home import SYSTEM, SmartHomeOptions, build, draw_rows, normalised
from pipelines.datasets.smart_home_grammar import Grammar, Template, draw, label, template_id
from pipelines.datasets.smart_home_house import ALIASES, AREAS, DEVICES

SMALL = SmartHomeOptions(train_rows=400, heldout_rows=80)
Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def grammar() -> Grammar:
    return grammar_module.load()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "not" / "there yet"
    build(SMALL, path)
    return path


@pytest.fixture(scope="module")
def train(folder: Path) -> Rows:
    return read(folder / "train.jsonl")


@pytest.fixture(scope="module")
def heldout(folder: Path) -> Rows:
    return read(folder / "heldout.jsonl")


def read(path: Path) -> Rows:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def utterance(row: dict[str, Any]) -> str:
    return str(row["messages"][1]["content"])


def call(row: dict[str, Any]) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(row["messages"][2]["content"])
    return answer


def accepting(grammar: Grammar, text: str, room: str | None = "kitchen") -> set[str]:
    """Ids of all templates that parse `text`, asked of the whole grammar, said in a room that the assistant knows of."""
    results = recognize_all(text, grammar.intents, slot_lists=grammar.slot_lists, intent_context={"area": room} if room else {})
    return {template_id(result.intent.name, str(result.intent_sentence.text)) for result in results if result.intent_sentence is not None}


def template_of(grammar: Grammar, intent: str, text: str) -> Template:
    [found] = [template for template in grammar.templates if template.id == template_id(intent, text)]
    return found


def test_build_small_options_gives_the_rows_asked(train: Rows, heldout: Rows) -> None:
    assert len(train) == 400
    assert Counter(row["slice"] for row in heldout) == {"seen_template": 40, "unseen_template": 40}
    assert all(set(row) == {"messages", "template"} for row in train)


def test_build_every_row_is_system_user_and_a_canonical_call(train: Rows, heldout: Rows) -> None:
    for row in train + heldout:
        assert [message["role"] for message in row["messages"]] == ["system", "user", "assistant"]
        assert row["messages"][0]["content"] == SYSTEM
        answer = call(row)
        assert list(answer) == ["name", "arguments"]
        assert list(answer["arguments"]) == sorted(answer["arguments"])
        assert row["messages"][2]["content"] == json.dumps(answer, separators=(",", ":"), ensure_ascii=False)


def test_build_splits_share_no_utterance(train: Rows, heldout: Rows) -> None:
    texts = [normalised(utterance(row)) for row in train + heldout]
    assert len(set(texts)) == len(texts)


def test_normalised_case_and_spaces_are_ignored() -> None:
    assert normalised("  Turn  ON the\tlights ") == "turn on the lights"


def test_build_unseen_row_is_parsed_by_no_template_of_training(grammar: Grammar, train: Rows, heldout: Rows) -> None:
    trained = {row["template"] for row in train} | {key for row in train for key in accepting(grammar, utterance(row))}
    unseen = [row for row in heldout if row["slice"] == "unseen_template"]
    for row in unseen:
        of_row = {row["template"]} | accepting(grammar, utterance(row)) | accepting(grammar, utterance(row), room=None)
        assert not trained & of_row, utterance(row)
    assert len({row["template"] for row in unseen}) >= 20


def test_build_seen_row_has_its_template_in_training(train: Rows, heldout: Rows) -> None:
    trained = {row["template"] for row in train}
    assert {row["template"] for row in heldout if row["slice"] == "seen_template"} <= trained


def test_build_unseen_row_asks_only_for_what_training_shows(train: Rows, heldout: Rows) -> None:
    shown = {(call(row)["name"], slot) for row in train for slot in ("", *call(row)["arguments"])}
    domains = {(call(row)["name"], call(row)["arguments"].get("domain")) for row in train}
    for row in heldout:
        if row["slice"] == "unseen_template":
            assert {(call(row)["name"], slot) for slot in ("", *call(row)["arguments"])} <= shown
            assert (call(row)["name"], call(row)["arguments"].get("domain")) in domains


def test_build_label_is_what_the_whole_parser_says(grammar: Grammar, train: Rows, heldout: Rows) -> None:
    # The builder asks a narrowed grammar for speed; here the whole one is asked.
    for row in heldout + train[:60]:
        result = recognize_best(utterance(row), grammar.intents, slot_lists=grammar.slot_lists)
        assert result is not None
        assert call(row) == {"name": result.intent.name, "arguments": {name: entity.value for name, entity in result.entities.items()}}


def test_build_no_intent_swamps_and_rare_ones_count(train: Rows) -> None:
    intents = Counter(call(row)["name"] for row in train)
    assert len(intents) == 11
    assert max(intents.values()) <= 0.25 * len(train)
    assert intents["HassMediaPause"] >= 4  # two templates of 150
    assert max(Counter(row["template"] for row in train).values()) <= 8  # the least cap; 1 % of 400 is 4


def test_draw_rows_one_intent_or_one_template_alone_is_capped(grammar: Grammar) -> None:
    def drawn(templates: list[Template]) -> int:
        return len(draw_rows(grammar, templates, 100, random.Random(0), set(), lambda row: True))

    own = [template for template in grammar.templates if template.intent == "HassTurnOn"]
    assert drawn(own) == 25  # 25 % of 100
    assert drawn([template_of(grammar, "HassTurnOn", "<turn> on [<the>] {name}")]) == 8  # the least that a cap may be


def test_build_slot_values_vary(train: Rows) -> None:
    arguments = [call(row)["arguments"] for row in train]
    assert {value.get("area") for value in arguments} >= set(AREAS)
    assert len({value.get("name") for value in arguments}) > 25


def test_build_other_hash_seed_gives_the_same_bytes_and_other_seed_does_not(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from pipelines.datasets.smart_home import *;"
        "build(SmartHomeOptions(train_rows=50, heldout_rows=8, seed=int(sys.argv[1])), Path(sys.argv[2]))"
    )
    for hash_seed, seed, name in (("1", "3", "first"), ("2", "3", "again"), ("1", "4", "other")):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        subprocess.run([sys.executable, "-c", program, seed, str(tmp_path / name)], check=True, env=environment, timeout=60)
    for file in ("train.jsonl", "heldout.jsonl"):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()
        assert (tmp_path / "first" / file).read_bytes() != (tmp_path / "other" / file).read_bytes()


def test_build_no_unseen_share_gives_seen_rows_only(tmp_path: Path) -> None:
    build(SmartHomeOptions(train_rows=60, heldout_rows=6, unseen_share=0.0), tmp_path)
    assert [row["slice"] for row in read(tmp_path / "heldout.jsonl")] == ["seen_template"] * 6


def test_build_more_rows_than_exist_says_found_needed_and_what_to_do(tmp_path: Path) -> None:
    # Two training rows have two templates, and one template gives at most eight rows of so few.
    with pytest.raises(ConfigError, match=r"Found \d+ distinct seen_template rows; 40 are needed\. Lower heldout_rows, "):
        build(SmartHomeOptions(train_rows=2, heldout_rows=40, unseen_share=0.0), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("intent", "sentence", "text"),
    [
        # Only the room of the speaker says which lights.
        ("HassTurnOff", "<turn> (off|out) <all> <light> [<everywhere>]", "turn off the lights"),
        ("HassTurnOn", "<turn> on [<the>] {name}", "open sesame"),
    ],
)
def test_label_meaning_that_the_words_do_not_hold_is_dropped(grammar: Grammar, intent: str, sentence: str, text: str) -> None:
    assert label(grammar, text, template_of(grammar, intent, sentence)) is None


def test_label_alias_gives_the_canonical_name(grammar: Grammar) -> None:
    template = template_of(grammar, "HassTurnOn", "<turn> on [<the>] {name}")
    row = label(grammar, "turn on the telly", template)
    assert row is not None
    assert row.answer == '{"name":"HassTurnOn","arguments":{"name":"television"}}'


def test_label_keeps_every_template_that_accepts_the_words(grammar: Grammar) -> None:
    drawn_from = template_of(grammar, "HassTurnOn", "<turn> on [<the>] {name}")
    row = label(grammar, "turn on movie night", drawn_from)
    assert row is not None
    assert row.templates == {drawn_from.id} | accepting(grammar, "turn on movie night")
    assert template_id("HassTurnOn", "<turn> ([<the>] {name} [scene];on)") in row.templates


def test_draw_every_template_gives_whole_sentences_that_mostly_parse(grammar: Grammar) -> None:
    rng = random.Random(1)
    texts = [draw(grammar, template, rng) for template in grammar.templates]
    assert not [text for text in texts if set(text) & set("{}<>[]()|;") or text != text.strip() or "  " in text]
    sample = rng.sample(list(zip(grammar.templates, texts, strict=True)), 80)
    assert sum(template.id in accepting(grammar, text) for template, text in sample) >= 0.9 * len(sample)


def test_house_names_have_one_domain_and_hold_no_area() -> None:
    spoken = [name for names in DEVICES.values() for name in names] + [alias for aliases in ALIASES.values() for alias in aliases]
    assert len(set(spoken)) == len(spoken)
    assert not [name for name in spoken if any(area in name for area in AREAS)]
    assert set(ALIASES) <= set(spoken)


def test_build_first_training_rows_hold_every_template(train: Rows) -> None:
    templates = {row["template"] for row in train}
    assert {row["template"] for row in train[: len(templates)]} == templates
