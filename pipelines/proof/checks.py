"""One line of a certificate, and what each kind of line would mean if it failed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pydantic import Field

from infra.config import Config

MEANINGS = {
    "lineage": "the folders do not belong to one another: what would be served is of another run, base or spec than what was trained",
    "held-out rows": "rows that were trained on are scored too, so the scores say nothing about new ones",
    "rendering": "the model was trained on other tokens, or on other labels, than the rows and the template say",
    "merge": "the merged weights are not base plus adapter",
    "effect": "the trained model is the base: the adapter was not loaded, or training changed nothing",
    "prompt ids": "the same chat becomes other tokens at another stage, so the model is asked something that it was not trained on",
    "log-probabilities": "the stage's model is another than the trained one, by more than its precision explains",
    "answers": "a stage answers otherwise than its own log-probabilities say, or does not stop where its model does",
    "context": "the server takes shorter or longer chats than the model was made for",
}
MAX_NOTED = 4


class Check(Config):
    """What was compared at one stage, by how much it differs, and whether that is too much."""

    name: str
    """One of `MEANINGS`."""
    stage: str
    passed: bool
    compared: str
    """What was compared with what."""
    found: str
    """What came out."""
    cause: str = ""
    """Where it failed: the likely cause."""
    figures: dict[str, float] = Field(default_factory=dict)

    @property
    def line(self) -> str:
        """For people: the stage, and what is wrong there or how far it is from wrong."""
        return f"{self.stage}: {self.found}" + (f"; {self.cause}" if self.cause else "")


def listed(name: str, stage: str, compared: str, problems: Sequence[str], passed_text: str) -> Check:
    """A check that fails by any of a list of problems; the first few are told."""
    if not problems:
        return Check(name=name, stage=stage, passed=True, compared=compared, found=passed_text)
    more = f" (and {len(problems) - MAX_NOTED} more)" if len(problems) > MAX_NOTED else ""
    found = f"{len(problems)} problem(s)"
    return Check(name=name, stage=stage, passed=False, compared=compared, found=found, cause="; ".join(problems[:MAX_NOTED]) + more)


def failed(checks: Iterable[Check]) -> list[Check]:
    """Those that did not pass."""
    return [check for check in checks if not check.passed]
