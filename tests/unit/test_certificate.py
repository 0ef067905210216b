"""The whole certificate: the gates that read it, and its explanation."""

from __future__ import annotations

from typing import Any

from pipelines.proof.certificate import certificate_gates
from pipelines.proof.checks import MEANINGS, Check
from pipelines.proving import explain


def certificate(*checks: Check) -> dict[str, Any]:
    same = {"value": 1.0, "low": 0.9, "high": 1.0, "n": 4}
    return {
        "reference": "adapter", "models": {"merged": {"same_answer": same}}, "checks": [check.model_dump() for check in checks],
        "candidates": ["int8", "int4"], "chats": {"heldout": 1, "adversarial": 2},
    }  # fmt: skip


def line(name: str, stage: str, passed: bool = True) -> Check:
    return Check(name=name, stage=stage, passed=passed, compared="this with that", found="0.5", cause="" if passed else "a broken thing")


def test_gates_of_one_candidate_leave_the_others_out() -> None:
    checks = [line("lineage", "merged"), line("answers", "int8"), line("answers", "int8 live"), line("answers", "int4 live", False)]
    checks.append(line("lineage", "int4", False))
    gates = {gate["name"]: gate["passed"] for gate in certificate_gates(certificate(*checks), "int8")}
    assert gates == {"certificate: lineage": True, "certificate: answers": True}
    refused = {gate["name"]: gate for gate in certificate_gates(certificate(*checks), "int4")}
    assert not refused["certificate: answers"]["passed"]
    assert refused["certificate: lineage"]["detail"] == "int4: 0.5; a broken thing"


def test_certificate_that_says_nothing_of_the_candidate_refuses_it() -> None:
    for told in ({}, certificate(), certificate(line("lineage", "merged")), certificate(line("lineage", "int4"))):
        assert [gate["passed"] for gate in certificate_gates(told, "int8")] == [False]


def test_explanation_tells_every_check_and_what_a_failure_would_mean() -> None:
    text = explain(certificate(*(line(name, "int8", name != "merge") for name in MEANINGS)), "good, by this machine's key").plain
    assert f"REFUSED: {len(MEANINGS) - 1} of {len(MEANINGS)} checks passed, over 1 held-out rows and 2 other chats" in text
    assert all(meaning in text for meaning in MEANINGS.values())
    assert "FAIL  int8: this with that: 0.5\n        a broken thing" in text
    assert "signature good" in text
