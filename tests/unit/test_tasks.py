"""Tasks of lm-evaluation-harness: figures made by hand, and the harness itself where it is installed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from scipy import stats

from infra.config import load_yaml
from infra.errors import ConfigError
from infra.evaluation.tasks import TaskFigure, TasksConfig, read_figures, task_comparisons, task_scores
from pipelines import preflight
from pipelines.plan import build_steps
from pipelines.runner import Planned
from pipelines.spec import Spec, load_spec


def figure(value: float, stderr: float | None = 0.03, **facts: bool) -> TaskFigure:
    return TaskFigure(value=value, stderr=stderr, n=200, **facts)


def test_task_scores_have_normal_intervals_and_no_width_without_a_standard_error() -> None:
    scores = task_scores({"lm_eval.a.acc": figure(0.5), "lm_eval.a.f1": figure(0.4, None)}, 0.95)
    assert scores["lm_eval.a.acc"] == {
        "value": 0.5,
        "low": pytest.approx(0.4412, abs=1e-4),
        "high": pytest.approx(0.5588, abs=1e-4),
        "n": 200,
    }
    assert scores["lm_eval.a.f1"] == {"value": 0.4, "low": 0.4, "high": 0.4, "n": 200}


def test_task_comparisons_agree_with_the_test_of_two_means_and_read_each_direction() -> None:
    base = {"lm_eval.a.acc": figure(0.6), "lm_eval.b.ppl": figure(20, 1.0, is_better_higher=False), "lm_eval.c.f1": figure(0.4, None)}
    merged = {"lm_eval.a.acc": figure(0.5), "lm_eval.b.ppl": figure(18, 1.0, is_better_higher=False), "lm_eval.c.f1": figure(0.1, None)}
    first, second = task_comparisons("merged", merged, "base", base, 0.95)
    assert first["loss"]["value"] == pytest.approx(0.1)
    assert second["loss"]["value"] == pytest.approx(-2)
    expected = stats.ttest_ind_from_stats(0.6, 0.03 * 200**0.5, 200, 0.5, 0.03 * 200**0.5, 200, equal_var=False).pvalue
    assert first["p"] == pytest.approx(expected, rel=0.05)  # normal for t with 398 degrees
    assert first["p_adjusted"] == pytest.approx(2 * first["p"])
    assert (first["finding"], second["finding"]) == (
        "worse" if first["p_adjusted"] <= 0.05 else "no difference shown",
        "no difference shown",
    )


@pytest.fixture
def spec_file(tmp_path: Path) -> Path:
    (tmp_path / "rows.jsonl").write_text("{}")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "own").mkdir()
    path = tmp_path / "spec.json"
    spec = {"name": "a", "base_model": "file:model", "dataset": {"type": "files", "train": "rows.jsonl"}}
    path.write_text(json.dumps({**spec, "evaluate": {"lm_eval": {"names": ["lamp_choice"], "folder": "own"}}}))
    return path


def test_spec_with_tasks_runs_them_on_every_stage_and_starts_again_with_a_changed_task(spec_file: Path) -> None:
    spec = load_spec(spec_file, [])
    assert spec.evaluate.lm_eval is not None
    assert spec.evaluate.lm_eval.folder == spec_file.parent / "own"
    steps = {step.name: step for step in build_steps(spec)}
    assert {"tasks-base", "tasks-merged", "tasks-openvino-int8"} <= set(steps["evaluate"].needs)
    assert steps["tasks-openvino-int8"].needs == {"quantize-openvino-int8": "quantized"}
    (spec_file.parent / "own" / "task.yaml").write_text("task: lamp_choice")
    again = {step.name: step for step in build_steps(spec)}
    digests = {"base": "d", "merge": "e"}
    assert again["tasks-base"].identity(digests) != steps["tasks-base"].identity(digests)


def test_spec_that_spares_the_candidates_the_tasks_leaves_the_other_figures_as_they_are(spec_file: Path) -> None:
    whole = {step.name: step for step in build_steps(load_spec(spec_file, []))}
    spared = {step.name: step for step in build_steps(load_spec(spec_file, ["evaluate.lm_eval.on_served=false"]))}
    assert set(whole) - set(spared) == {"tasks-openvino-int8"}
    assert "tasks-openvino-int8" not in spared["evaluate"].needs
    assert whole["tasks-base"].identity({"base": "d"}) == spared["tasks-base"].identity({"base": "d"})


def test_spec_with_tasks_without_the_package_names_the_extra(spec_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = preflight.find_spec
    monkeypatch.setattr(preflight, "find_spec", lambda name: None if name == "lm_eval" else found(name))
    planned = [Planned(step, True, "") for step in build_steps(load_spec(spec_file, [])) if step.name.startswith("tasks")]
    with pytest.raises(ConfigError, match=r"lm_eval.*slipway-ml\[lm-eval\]"):
        preflight._check_modules(planned)


def test_gate_on_tasks_that_nobody_named_is_refused(spec_file: Path) -> None:
    data = load_yaml(spec_file)
    with pytest.raises(ValueError, match=r"max_task_loss asks for tasks"):
        Spec.model_validate({**data, "evaluate": {}, "gates": {"max_task_loss": 0.1}})


TASKS = {
    "lamp_choice": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: ["on", "off"]
doc_to_target: "{{answer}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
""",
    "lamp_text": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}} {{answer}}"
metric_list:
  - {metric: byte_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
""",
    "lamp_words": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["e"], max_gen_toks: 12}
metric_list:
  - {metric: bleu, aggregation: bleu, higher_is_better: true}
""",
}
"""One task of each way in which the harness asks."""


@pytest.fixture
def own_tasks(tmp_path: Path) -> TasksConfig:
    pytest.importorskip("lm_eval", reason="comes with the extra lm-eval")
    rows, folder = tmp_path / "rows.jsonl", tmp_path / "own"
    rows.write_text(
        "".join(
            json.dumps({"question": f"turn the lamp {one} {number}:", "answer": one}) + "\n" for one in ("on", "off") for number in range(6)
        )
    )
    folder.mkdir()
    for name, text in TASKS.items():
        source = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {rows}}}}}\ntest_split: test\n"
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{source}{text}")
    return TasksConfig(names=tuple(TASKS), limit_rows=10, folder=folder)


@pytest.mark.slow
def test_harness_asks_the_served_model_as_it_asks_the_trained_one(
    toy_base: Path, toy_quantized: Path, own_tasks: TasksConfig, tmp_path: Path
) -> None:
    """The reference engine serves the base as it is, so its figures are those of the training stack; INT8 moves them a little."""
    from serving import harness as served
    from serving.config import ServeConfig
    from serving.harness_config import HarnessJob as ServedJob
    from training import harness as trained
    from training.harness_config import HarnessJob

    trained.run_tasks(HarnessJob(output_dir=tmp_path / "trained", model_dir=toy_base, tasks=own_tasks, precision="fp32"))
    served.run_tasks(
        ServedJob(output_dir=tmp_path / "torch", model_dir=toy_base, tasks=own_tasks, serve=ServeConfig(engine="torch", precision="f32"))
    )
    served.run_tasks(ServedJob(output_dir=tmp_path / "int8", model_dir=toy_quantized, tasks=own_tasks, serve=ServeConfig()))
    wanted, same, near = (read_figures(tmp_path / name) for name in ("trained", "torch", "int8"))
    assert list(wanted) == ["lm_eval.lamp_choice.acc", "lm_eval.lamp_text.byte_perplexity", "lm_eval.lamp_words.bleu"]
    assert {name: (it.value, it.n) for name, it in same.items()} == {name: (pytest.approx(it.value), it.n) for name, it in wanted.items()}
    text = "lm_eval.lamp_text.byte_perplexity"
    assert near[text].value == pytest.approx(wanted[text].value, rel=0.02)
    assert near[text].value != wanted[text].value
    assert wanted["lm_eval.lamp_choice.acc"].n == 10
    assert wanted["lm_eval.lamp_choice.acc"].stderr is not None


@pytest.mark.slow
def test_task_that_the_harness_lacks_is_named(toy_base: Path, own_tasks: TasksConfig, tmp_path: Path) -> None:
    from training.harness import run_tasks
    from training.harness_config import HarnessJob

    tasks = own_tasks.model_copy(update={"names": ("lamp_choise",)})
    with pytest.raises(ConfigError, match="the harness has no lamp_choise"):
        run_tasks(HarnessJob(output_dir=tmp_path / "out", model_dir=toy_base, tasks=tasks))
