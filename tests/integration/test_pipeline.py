"""The whole job on a toy model: real Ray Train, MLflow, OpenVINO and Ray Serve, one run shared by all tests here."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.integration.conftest import slipway


def test_run_reports_every_public_key(report: dict[str, Any]) -> None:
    keys = {"run_id", "spec_fingerprint", "model", "scores", "gates", "parity", "receipt", "timings_s", "cost", "serving"}
    assert keys <= set(report)
    assert set(report["scores"]) == {"base", "adapter", "merged", "openvino-int8", "openvino-int4-awq"}
    score = report["scores"]["adapter"]["exact_match_json"]
    assert score["n"] == 8
    assert score["low"] <= score["value"] <= score["high"]
    assert report["model"]["aliases"] == ["challenger", "champion"]
    assert all(gate["passed"] for gate in report["gates"])
    served = next(it for it in report["comparisons"] if (it["model"], it["reference"]) == ("openvino-int8", "adapter"))
    assert (served["metric"], served["test"], served["loss"]["n"]) == ("exact_match_json", "mcnemar", 8)
    assert report["noise"]["openvino-int8"]["rows"] == 8
    perplexity = {name: found["perplexity"]["value"] for name, found in report["scores"].items()}
    assert perplexity["adapter"] < 0.5 * perplexity["base"]  # it has been trained on such rows
    assert perplexity["openvino-int8"] == pytest.approx(perplexity["merged"], rel=0.1)


def test_run_judges_every_candidate_and_serves_the_cheapest(report: dict[str, Any], home: Path) -> None:
    from infra import tracking
    from infra.contracts import read_manifest

    choice = report["candidates"]
    by_format = {each["format"]: each for each in choice["candidates"]}
    assert list(by_format) == ["openvino-int8", "openvino-int4-awq"]
    assert by_format["openvino-int4-awq"]["bytes"] < by_format["openvino-int8"]["bytes"]
    assert all(each["tokens_per_s"] > 0 and each["ms_per_token"] > 0 and each["passed"] for each in by_format.values())
    cheapest = min(by_format.values(), key=lambda each: each["bytes"])
    assert [each["format"] for each in by_format.values() if each["chosen"]] == [choice["selected"]]
    assert by_format[choice["selected"]]["bytes"] <= 1.05 * cheapest["bytes"]
    assert report["gates"] == by_format[choice["selected"]]["gates"]
    client = tracking.client(f"sqlite:///{home}/mlflow.db")
    version = client.get_model_version_by_alias("toy", "champion")
    served = read_manifest(Path(version.source.removeprefix("file://"))).model
    assert served is not None
    assert served.quantization == choice["selected"]
    assert {"candidates.json", "candidates_table.json"} <= {item.path for item in client.list_artifacts(report["run_id"])}


@pytest.mark.slow
def test_run_of_full_fine_tuning_needs_no_merge(toy_spec: Path, home: Path, report: dict[str, Any]) -> None:
    changes = [
        "--set",
        "name=toy-full",
        "--set",
        "quantize.formats=[openvino-int8]",
        "--set",
        "train.method=full",
        "--set",
        "train.learning_rate=1e-4",
    ]
    done = slipway(home, "run", str(toy_spec), "--json", "--no-serve", *changes)
    assert done.returncode == 0, done.stderr
    full = json.loads(done.stdout)
    assert set(full["scores"]) == {"base", "merged", "openvino-int8"}
    assert "merge" not in full["timings_s"]
    assert full["model"]["aliases"] == ["challenger", "champion"]


def test_run_sends_one_real_request_and_keeps_its_answer(report: dict[str, Any]) -> None:
    response = report["serving"]["sample_response"]
    assert response["object"] == "chat.completion"
    assert response["model"] == "toy"
    assert response["usage"]["completion_tokens"] >= 1


def test_run_leaves_no_process(report: dict[str, Any], home: Path) -> None:
    assert report["run_id"]
    left = [process.info for process in psutil.process_iter(["pid", "cmdline"]) if str(home) in " ".join(process.info["cmdline"] or [])]
    assert left == []


def test_run_is_one_mlflow_run_with_a_nested_run_a_step(report: dict[str, Any], home: Path) -> None:
    from infra import tracking

    client = tracking.client(f"sqlite:///{home}/mlflow.db")
    parent = client.get_run(report["run_id"])
    assert parent.info.status == "FINISHED"
    assert parent.data.params["train.lora.rank"] == "4"
    assert parent.inputs.dataset_inputs[0].dataset.name == "toy-rows"
    nested = client.search_runs([parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{report['run_id']}'")
    assert {run.info.run_name for run in nested} == set(report["timings_s"])
    assert all(run.info.status == "FINISHED" for run in nested)
    train = next(run for run in nested if run.info.run_name == "train")
    losses = [metric.value for metric in client.get_metric_history(train.info.run_id, "loss")]
    assert losses[-1] < losses[0]
    assert {"report.json", "receipt.json", "certificate.json", "adapter.json", "plots"} <= {
        item.path for item in client.list_artifacts(report["run_id"])
    }
    assert [item.path for item in client.list_artifacts(report["run_id"], "plots")] == [
        "plots/candidates.png",
        "plots/loss.png",
        "plots/scores.png",
    ]
    assert [item.path for item in client.list_artifacts(train.info.run_id)] == ["samples.json"]


def test_mlflow_holds_a_reference_to_the_adapter_and_no_weights(report: dict[str, Any], home: Path, tmp_path: Path) -> None:
    from infra import tracking
    from infra.contracts import read_manifest

    client = tracking.client(f"sqlite:///{home}/mlflow.db")
    reference = json.loads(Path(client.download_artifacts(report["run_id"], "adapter.json", str(tmp_path))).read_text())
    assert read_manifest(Path(reference["path"])).digest == reference["digest"]
    logged = [path for path in (home / "mlartifacts").rglob("*") if path.is_file()]
    assert not [path for path in logged if path.suffix in (".safetensors", ".bin", ".gguf", ".pt", ".xml")]
    assert max(path.stat().st_size for path in logged) < 1 << 20  # the toy's own weights are no larger, so their kinds are looked at too
    (version,) = client.search_model_versions("name='toy' and run_id='" + report["run_id"] + "'")
    assert version.source.startswith("file:")
    assert (home / "artifacts") in Path(version.source.removeprefix("file://")).parents


def test_version_carries_gates_certificate_lineage_and_a_model_card(report: dict[str, Any], home: Path) -> None:
    from infra import tracking

    client = tracking.client(f"sqlite:///{home}/mlflow.db")
    version = client.get_model_version("toy", report["model"]["version"])
    assert version.tags["slipway.gates"] == "passed"
    gates = {key: value for key, value in version.tags.items() if key.startswith("slipway.gate.")}
    assert len(gates) == len(report["gates"])
    assert all(value.startswith("passed: ") for value in gates.values())
    assert version.tags["slipway.certificate"] == "holds"
    lineage = {key.removeprefix("slipway.lineage."): value for key, value in version.tags.items() if key.startswith("slipway.lineage.")}
    assert {"spec", "data", "tokens", "base", "adapter", "merged", "quantized"} <= set(lineage)
    assert lineage["spec"] == report["spec_fingerprint"]
    assert lineage["quantized"] == report["model"]["digest"]
    assert version.tags["slipway.promoted.by"]
    assert {"model-card.md", "model-card.html"} <= {item.path for item in client.list_artifacts(report["run_id"])}
    assert version.description.startswith("# toy version ")
    assert "| exact_match_json |" in version.description


@pytest.mark.parametrize(("stage", "artifacts"), [("merge", "merge"), ("quantize", "quantize"), ("evaluate", "evaluate")])
def test_one_stage_finds_what_the_whole_run_made(report: dict[str, Any], toy_spec: Path, home: Path, stage: str, artifacts: str) -> None:
    done = slipway(home, stage, str(toy_spec), "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {name.partition("-")[0] for name in found["artifacts"]} == {artifacts}
    assert all(Path(made["path"], "manifest.json").is_file() for made in found["artifacts"].values())
    assert set(found["timings_s"]) < set(report["timings_s"])
    assert found.get("scores") == (report["scores"] if stage == "evaluate" else None)


def test_second_run_redoes_no_step(report: dict[str, Any], toy_spec: Path, home: Path) -> None:
    done = slipway(home, "run", str(toy_spec), "--json", "--no-serve")
    assert done.returncode == 0, done.stderr
    again = json.loads(done.stdout)
    assert set(again["skipped"]) == set(again["timings_s"]) == set(report["timings_s"])
    assert again["model"] == report["model"]
    assert again["scores"] == report["scores"]


def test_dry_run_says_what_would_run_and_starts_nothing(report: dict[str, Any], toy_spec: Path, home: Path) -> None:
    assert report["run_id"]
    runs_before = sorted((home / "runs").iterdir())
    done = slipway(home, "run", str(toy_spec), "--dry-run", "--json", "--set", "train.lora.rank=8")
    will_run = {step["step"]: step["will_run"] for step in json.loads(done.stdout)["steps"]}
    assert not will_run["rows@3"]
    assert not will_run["predict-base@1"]
    assert will_run["train@4"]
    assert will_run["gate@5"]
    assert sorted((home / "runs").iterdir()) == runs_before


def test_train_dry_run_tells_memory_and_time_and_trains_nothing(report: dict[str, Any], toy_spec: Path, home: Path) -> None:
    made_before = sorted((home / "artifacts").iterdir())
    done = slipway(home, "train", str(toy_spec), "--dry-run", "--json", "--set", "train.seed=5")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["steps"] == 12
    assert found["memory_bytes"]["total"] < found["memory_bytes"]["available"]
    assert sorted((home / "artifacts").iterdir()) == made_before


def test_train_alone_finds_what_the_whole_run_made(report: dict[str, Any], toy_spec: Path, home: Path) -> None:
    done = slipway(home, "train", str(toy_spec), "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["training"]["final_loss"] == report["training"]["final_loss"]
    assert Path(found["path"], "adapter_model.safetensors").is_file()


def test_gate_that_refuses_exits_3_and_leaves_the_champion(report: dict[str, Any], toy_spec: Path, home: Path) -> None:
    served = report["candidates"]["selected"]  # by name: which of them is cheapest depends on how busy this machine is
    changes = ["gates.min_score=1", "gates.min_slice_scores={absent: 0.5}", f"quantize.choose={served}"]
    done = slipway(home, "run", str(toy_spec), *(word for change in changes for word in ("--set", change)))
    assert done.returncode == 3
    assert f"exact_match_json of {served}: 0.000, at least 1.000 needed" in done.stderr
    assert "slice absent: not measured" in done.stderr
    listed = json.loads(slipway(home, "status", "toy", "--json").stdout)["versions"]
    assert [(version["version"], version["aliases"]) for version in listed] == [("1", ["challenger", "champion"])]
    everything = json.loads(slipway(home, "status", "--registered", "--json").stdout)["versions"]
    assert [version for version in everything if version["name"] == "toy"] == listed
    refused = slipway(home, "promote", str(toy_spec))
    assert refused.returncode == 3
    assert "0.000, at least 1.000 needed" in refused.stderr
    assert slipway(home, "promote", "toy", "--force").returncode == 2, "nobody said why"
    forced = slipway(home, "promote", "toy", "--force", "--reason", "a test", "--json")
    assert json.loads(forced.stdout)["aliases"] == ["challenger", "champion"]
    assert slipway(home, "rollback", "toy").returncode == 2, "there is no way back from the first"


def test_port_in_use_is_refused_before_any_step(toy_spec: Path, tmp_path: Path, busy_port: int) -> None:
    done = slipway(tmp_path / "home", "run", str(toy_spec), "--set", f"serve.port={busy_port}")
    assert done.returncode == 2
    assert f"port {busy_port} on 127.0.0.1 cannot be used" in done.stderr
    assert not (tmp_path / "home" / "staging").exists()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("", "no rows in it"),
        ('{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}\n{oops\n', "train.jsonl:2"),
        ('{"messages": [{"role": "user", "content": "x"}]}\n', "assistant"),
        ('{"foo": 1}\n', "messages"),
    ],
)
def test_bad_dataset_exits_2_and_says_where(toy_spec: Path, home: Path, tmp_path: Path, rows: str, message: str) -> None:
    (tmp_path / "train.jsonl").write_text(rows)
    done = slipway(home, "run", str(toy_spec), "--no-serve", "--set", f"dataset.train={tmp_path / 'train.jsonl'}")
    assert done.returncode == 2, done.stderr
    assert message in done.stderr


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("dataset.train=absent.jsonl", "absent.jsonl does not exist"),
        ("base_model=file:/absent", "looked at /absent"),
        ("base_model=package:absent/x.gguf", "'absent' is not installed"),
        ("base_model=model", "file:PATH, package:DISTRIBUTION/FILE, hf:OWNER/NAME"),
        ("trian.epochs=1", "did you mean 'train'"),
    ],
)
def test_bad_spec_exits_2_and_says_what_to_do(toy_spec: Path, tmp_path: Path, override: str, message: str) -> None:
    done = slipway(tmp_path / "home", "run", str(toy_spec), "--no-serve", "--set", override)
    assert done.returncode == 2
    assert message in done.stderr
    assert not (tmp_path / "home" / "staging").exists()


def test_rows_longer_than_the_limit_are_counted_and_refused(toy_spec: Path, report: dict[str, Any], home: Path) -> None:
    assert report["receipt"]
    done = slipway(home, "run", str(toy_spec), "--no-serve", "--set", "data.max_tokens=8")
    assert done.returncode == 2
    assert "too_long" in done.stderr
    assert "96" in done.stderr


def test_ctrl_c_while_training_exits_130_and_a_later_run_resumes(report: dict[str, Any], toy_spec: Path, home: Path) -> None:
    assert report["run_id"]
    change = ["--set", "train.seed=1", "--set", "train.epochs=200", "--set", "train.checkpoint_steps=1"]
    environment = {**os.environ, "SLIPWAY_HOME": str(home)}
    command = [sys.executable, "-m", "pipelines.cli", "run", str(toy_spec), "--no-serve", *change]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        wait_for_progress(home / "staging", steps=5)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command resumes" in stderr
    plan = json.loads(slipway(home, "run", str(toy_spec), "--dry-run", "--json", *change).stdout)["steps"]
    assert "resumes" in next(step["reason"] for step in plan if step["step"] == "train@4")


def wait_for_progress(staging: Path, steps: int, timeout_s: float = 120) -> None:
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        for path in staging.glob("train-*/progress.jsonl"):
            lines = path.read_text().splitlines()
            if len(lines) >= steps:
                return
        time.sleep(0.1)
    raise AssertionError(f"training made no progress in {timeout_s} s")


def test_run_certifies_every_stage_of_every_candidate(report: dict[str, Any]) -> None:
    parity = report["parity"]
    assert parity["passed"], [check for check in parity["checks"] if not check["passed"]]
    formats = [each["format"] for each in report["candidates"]["candidates"]]
    stages = {check["stage"] for check in parity["checks"] if check["name"] == "prompt ids"}
    assert stages == {"adapter", "merged", *formats, *(f"{each} live" for each in formats)}
    told = {check["stage"]: check["figures"] for check in parity["checks"] if check["name"] == "log-probabilities"}
    assert set(told) == {"merged", *formats, *(f"{each} live" for each in formats)}
    assert all(figures["tokens"] > 0 for figures in told.values())
    assert {"certificate: lineage", "certificate: prompt ids"} <= {gate["name"] for gate in report["gates"]}


def test_prove_explains_the_certificate_of_a_spec_and_of_a_promoted_model(report: dict[str, Any], toy_spec: Path, home: Path) -> None:
    assert report["parity"]["passed"]
    for named, signature in ((str(toy_spec), "signature good"), ("toy@champion", "signature good, by this machine's key")):
        done = slipway(home, "prove", named, "--explain")
        assert done.returncode == 0, done.stderr
        assert "certificate passed" in done.stdout
        assert signature in done.stdout
        assert "a failure would mean: the same chat becomes other tokens at another stage" in done.stdout
    absent = slipway(home, "prove", str(toy_spec), "--explain", "--set", "train.seed=9")
    assert absent.returncode == 2
    assert "no certificate yet" in absent.stderr


def test_promoted_model_is_signed_and_an_altered_or_unsigned_one_is_not_served(report: dict[str, Any], home: Path, tmp_path: Path) -> None:
    from infra.contracts import read_manifest
    from infra.signing import check_seal, public_file, trusted_keys

    private = home / "keys" / "signing.pem"
    assert private.stat().st_mode & 0o077 == 0
    name = report["model"]["name"]
    folder = next(path for path in (home / "artifacts").iterdir() if read_manifest(path).digest == report["model"]["digest"])
    seal = check_seal(folder, trusted_keys(public_file(private)))
    assert seal.predicate["artifact_digest"] == report["model"]["digest"]
    assert set(seal.documents) == {"certificate.json", "sbom.cdx.json"}
    altered, unsigned = tmp_path / "altered", tmp_path / "unsigned"
    shutil.copytree(folder, altered)
    shutil.copytree(folder, unsigned, ignore=shutil.ignore_patterns("seal"))
    manifest = json.loads((altered / "manifest.json").read_text())
    manifest["model"]["stop_ids"] = [0]
    (altered / "manifest.json").write_text(json.dumps(manifest))
    for place, message in ((altered, "altered after it was signed"), (unsigned, "serve.allow_unsigned=[unsigned]")):
        done = slipway(home, "serve", str(place))
        assert done.returncode == 2, name
        assert message in done.stderr
    signed = slipway(home, "sign", str(unsigned))
    assert signed.returncode == 0, signed.stderr
    assert check_seal(unsigned, trusted_keys(public_file(private))).predicate["by_hand"]
    shown = "".join(path.read_text(errors="replace") for path in (home / "runs").rglob("*") if path.is_file() and path.suffix != ".png")
    assert private.read_text().splitlines()[1] not in shown
