"""The steps that score and that judge, on artifacts made by hand: every file that they write and read."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from infra.answers import Answer, ExpectedLogprob, Prompt, write_answers, write_expected, write_prompts
from infra.contracts import Kind, write_manifest
from infra.errors import ConfigError
from infra.evaluation.own_scorer import source_digest
from infra.evaluation.tasks import TASKS_NAME, TaskFigure
from infra.files import read_json, write_json_atomic
from infra.provenance import Provenance
from pipelines.measures import EvaluateConfig, GatesConfig
from pipelines.step import Artifact, StepContext
from pipelines.steps import evaluate, gate

NAMES = ["base", "adapter", "merged", "openvino-int8"]
CALLS = ['{"name":"on","arguments":{}}', '{"name":"off","arguments":{}}']
METRICS = ("exact_match_json", "tool_fields", "stop_rate", "perplexity")
NUM_ROWS = 40


def artifact(folder: Path, kind: Kind) -> Artifact:
    return Artifact(folder, write_manifest(folder, kind, Provenance()))


def context(output_dir: Path, inputs: dict[str, Artifact]) -> StepContext:
    def no_program(module: str, job: Any) -> None:
        raise AssertionError(f"{module} is not run here")

    output_dir.mkdir()
    return StepContext(output_dir, inputs, Provenance(), None, output_dir / "progress.jsonl", no_program)


def answered(folder: Path, wrong: set[int], num_rows: int = NUM_ROWS) -> Artifact:
    folder.mkdir()
    texts = ["?" if row in wrong else CALLS[row % 2] for row in range(num_rows)]
    timed = {3: 0.2, 4: 0.3} if "int8" in folder.name else {}
    write_answers(
        folder,
        [Answer(row=row, ids=(1,), text=text, finish_reason="stop", latency_s=timed.get(row)) for row, text in enumerate(texts)],
    )
    if "int8" in folder.name:
        write_json_atomic(folder / "speed.json", {"1": {"ms_per_token": 5.0, "tokens_per_s": 200.0}})
    if folder.name == "predict-adapter":
        write_expected(folder, [ExpectedLogprob(row=row, logprob_sum=2 * math.log(0.5), num_tokens=2) for row in range(num_rows)])
    return artifact(folder, "answers")


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Artifact]:
    tokens = tmp_path / "render"
    tokens.mkdir()
    write_prompts(tokens, [Prompt(row=row, ids=(1,) * (row + 1), expected=CALLS[row % 2], language="en") for row in range(NUM_ROWS)])
    write_json_atomic(tokens / gate.RECEIPT_NAME, {})
    wrong = dict(zip(NAMES, (set(range(40)), {3}, {3}, {1, 3}), strict=True))
    made = {f"predict-{name}": answered(tmp_path / f"predict-{name}", wrong[name]) for name in NAMES}
    repeated = answered(tmp_path / "repeat-openvino-int8", {3, 5}, num_rows=10)
    return {"render": artifact(tokens, "tokens"), "repeat-openvino-int8": repeated, **made}


@pytest.fixture
def scored(tmp_path: Path, inputs: dict[str, Artifact]) -> Path:
    config = evaluate.ScoreConfig(
        evaluate=EvaluateConfig(metrics=METRICS, repeated_rows=10), margins={"openvino-int8": {"exact_match_json": 0.02}}
    )
    evaluate.run(NAMES, config, context(tmp_path / "evaluate", inputs))
    return tmp_path / "evaluate"


def test_evaluate_scores_models_slices_and_what_only_some_carry(scored: Path) -> None:
    scores = read_json(scored / evaluate.SCORES_NAME)
    assert list(scores) == sorted(NAMES)
    assert scores["openvino-int8"]["exact_match_json"] == {
        "value": 0.95,
        "low": pytest.approx(0.835, abs=1e-3),
        "high": pytest.approx(0.986, abs=1e-3),
        "n": 40,
    }
    assert scores["openvino-int8"]["exact_match_json/tool=off"]["value"] == 0.9
    assert {key: found["n"] for key, found in scores["base"].items() if key.startswith("stop_rate/length")} == {
        "stop_rate/length=short": 14,
        "stop_rate/length=medium": 13,
        "stop_rate/length=long": 13,
    }
    assert not [key for key in scores["base"] if "language" in key]  # all rows are English
    assert scores["adapter"]["perplexity"]["value"] == pytest.approx(2.0)
    assert "perplexity" not in scores["merged"]


def test_evaluate_compares_tells_details_and_measures_noise(scored: Path) -> None:
    comparisons = read_json(scored / evaluate.COMPARISONS_NAME)
    served = [each for each in comparisons if (each["model"], each["reference"]) == ("openvino-int8", "adapter")]
    assert [each["metric"] for each in served] == ["exact_match_json", "tool_fields", "stop_rate"]
    assert served[0]["loss"]["value"] == pytest.approx(1 / 40)
    assert served[0]["verdict"] == "undecided"
    gain = next(each for each in comparisons if (each["model"], each["reference"]) == ("adapter", "base"))
    assert (gain["finding"], gain["loss"]["value"]) == ("better", pytest.approx(-39 / 40))
    assert read_json(scored / evaluate.DETAILS_NAME)["openvino-int8"]["fields"]["name"]["missing"] == 2
    noise = read_json(scored / evaluate.NOISE_NAME)["openvino-int8"]
    assert (noise["rows"], noise["differing"]) == (10, 2)  # rows 1 and 5: the first is right the second time, the other wrong
    assert noise["floor"]["exact_match_json"] == pytest.approx(1.959964 * (0.2 / 40) ** 0.5)


def test_evaluate_puts_general_tasks_beside_and_tells_what_was_forgotten(tmp_path: Path, inputs: dict[str, Artifact]) -> None:
    for name, value in (("base", 0.6), ("merged", 0.4), ("openvino-int8", 0.3)):
        folder = tmp_path / f"tasks-{name}"
        folder.mkdir()
        write_json_atomic(folder / TASKS_NAME, {"lm_eval.arc.acc": TaskFigure(value=value, stderr=0.03, n=200).model_dump()})
        inputs = inputs | {folder.name: artifact(folder, "scores")}
    config = evaluate.ScoreConfig(evaluate=EvaluateConfig(repeated_rows=10), margins={})
    evaluate.run(NAMES, config, context(tmp_path / "out", inputs))
    scores = read_json(tmp_path / "out" / evaluate.SCORES_NAME)
    assert [name for name in NAMES if "lm_eval.arc.acc" in scores[name]] == ["base", "merged", "openvino-int8"]
    forgotten = read_json(tmp_path / "out" / evaluate.COMPARISONS_NAME)[-2:]
    assert [(told["model"], told["reference"], told["finding"]) for told in forgotten] == [
        ("merged", "base", "worse"),
        ("openvino-int8", "base", "worse"),
    ]
    assert [told["loss"]["value"] for told in forgotten] == pytest.approx([0.2, 0.3])


def test_gate_reads_what_evaluate_wrote(tmp_path: Path, scored: Path, inputs: dict[str, Artifact]) -> None:
    certificate = tmp_path / "prove"
    certificate.mkdir()
    change = {"value": -0.025, "low": -0.09, "high": 0.04, "n": 40}
    models = {"merged": {"same_answer": {"value": 1.0}}, "openvino-int8": {"score_change": change}}
    check = {"name": "answers", "stage": "openvino-int8", "passed": True, "compared": "", "found": ""}
    write_json_atomic(certificate / "certificate.json", {"reference": "adapter", "models": models, "checks": [check]})
    quantized = tmp_path / "quantize"
    quantized.mkdir()
    (quantized / "model.bin").write_bytes(b"0" * 1000)
    given = {
        "evaluate": artifact(scored, "scores"),
        "prove": artifact(certificate, "certificate"),
        "render": inputs["render"],
        "quantize-openvino-int8": artifact(quantized, "quantized"),
        "predict-openvino-int8": inputs["predict-openvino-int8"],
    }
    config = gate.ChoiceConfig(gates=GatesConfig(max_size_bytes=1000, max_latency_s=0.4, min_worst_slice_score=0.95), choose="cheapest")
    gate.run(["openvino-int8"], "exact_match_json", config, context(tmp_path / "gate", given))
    gates = {each["name"]: each for each in read_json(tmp_path / "gate" / gate.GATES_NAME)}
    assert {name for name, each in gates.items() if not each["passed"]} == {"exact_match_json of openvino-int8 on its worst slice"}
    assert "within the noise floor of 0.139" in gates["drop by quantization"]["detail"]
    assert gates["bytes of openvino-int8"]["detail"] == "1,000, at most 1,000 allowed"
    assert gates["seconds of an answer of openvino-int8"]["detail"] == "mean [0.200, 0.300] on 2 rows: 0.250, at most 0.400 allowed"


def test_evaluate_with_an_answer_missing_or_of_another_row_is_refused(tmp_path: Path, inputs: dict[str, Artifact]) -> None:
    config = evaluate.ScoreConfig(evaluate=EvaluateConfig(repeated_rows=10), margins={})
    short = inputs | {"predict-merged": answered(tmp_path / "short", set(), num_rows=39)}
    with pytest.raises(ConfigError, match="39 answers for 40 prompts"):
        evaluate.run(NAMES, config, context(tmp_path / "first", short))
    other = tmp_path / "other"
    other.mkdir()
    write_answers(other, [Answer(row=row + 1, ids=(1,), text="", finish_reason="stop") for row in range(NUM_ROWS)])
    with pytest.raises(ConfigError, match="other rows"):
        evaluate.run(NAMES, config, context(tmp_path / "second", inputs | {"predict-merged": artifact(other, "answers")}))


def test_step_of_an_own_scorer_changes_identity_with_its_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipelines.spec import Spec

    source = tmp_path / "own_scorer_of_a_spec.py"
    source.write_text("def score(answer, expected):\n    return 1.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    name = f"{source.stem}:score"
    dataset = {"type": "files", "train": "x"}
    spec = Spec.model_validate({"name": "a", "base_model": "file:x", "dataset": dataset, "evaluate": {"metrics": [name]}})
    before = evaluate.step(spec)
    assert before.source_digests == {name: source_digest(name)}
    source.write_text(source.read_text() + "\n# changed\n")
    digests = dict.fromkeys(before.needs, "d")
    assert evaluate.step(spec).identity(digests) != before.identity(digests)
