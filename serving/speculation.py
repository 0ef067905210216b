"""Whether guessing tokens ahead pays, by what it brought and cost lately.

- Guesses are checked in the step that makes the next token: such a step gives more tokens and takes longer, the more so the more requests
  share it. So each load (requests at once, in powers of two) is measured apart, with guesses and without.
- At each load both ways are tried first. Then the faster one stays, and now and then the other is tried again.
- Where too few guesses are right, a trial with guesses ends early; above the bound on requests there are none.
- Times are given, never taken. What is decided holds until the next step has been noted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

TRIAL_STEPS = 64
HELD_STEPS = 1000  # until the other way is tried again: at half the speed, trials cost 6% of the time
JUDGED_DRAFTS = 24  # fewer say too little about how many guesses are right
KEPT_SHARE = 1 - 1 / TRIAL_STEPS  # of what was measured, with each step


@dataclass
class Rate:
    """Tokens a second over the last steps."""

    tokens: float = 0.0
    seconds: float = 0.0

    def note(self, num_tokens: int, elapsed_s: float) -> None:
        """Adds a step; earlier ones count a little less from then on."""
        self.tokens = KEPT_SHARE * self.tokens + num_tokens
        self.seconds = KEPT_SHARE * self.seconds + elapsed_s

    @property
    def per_s(self) -> float | None:
        """None before the first step."""
        return self.tokens / self.seconds if self.seconds else None


@dataclass
class Level:
    """What is known at one load."""

    with_guesses: Rate = field(default_factory=Rate)
    without: Rate = field(default_factory=Rate)
    is_on: bool = True
    is_trial: bool = True
    num_left: int = TRIAL_STEPS
    num_drafts: int = 0
    """Since the trial or the stay began, as the next two."""
    num_drafted: int = 0
    num_accepted: int = 0

    def note(self, is_guessing: bool, num_tokens: int, elapsed_s: float, min_acceptance: float) -> None:
        """Takes a step in, and goes over to the other way where it is time."""
        (self.with_guesses if is_guessing else self.without).note(num_tokens, elapsed_s)
        if is_guessing != self.is_on:  # requests of the time before
            return
        self.num_left -= 1
        if self.is_on and self.num_drafts >= JUDGED_DRAFTS and self.num_accepted < min_acceptance * self.num_drafted:
            self._begin(is_on=False, is_trial=False)
        elif self.num_left <= 0:
            self._end()

    def _end(self) -> None:
        fast, slow = self.with_guesses.per_s, self.without.per_s
        if not self.is_trial or fast is None or slow is None:
            self._begin(not self.is_on, is_trial=True)
        else:
            self._begin(fast >= slow, is_trial=False)

    def _begin(self, is_on: bool, is_trial: bool) -> None:
        self.is_on, self.is_trial = is_on, is_trial
        self.num_left = TRIAL_STEPS if is_trial else HELD_STEPS
        self.num_drafts = self.num_drafted = self.num_accepted = 0


class Speculation:
    """Counts guesses, and decides whether the next step should have some."""

    def __init__(self, max_requests: int, min_acceptance: float) -> None:
        self._max_requests = max_requests
        self._min_acceptance = min_acceptance
        self._levels: dict[int, Level] = {}
        self.num_drafts = 0
        """Runs of guesses checked so far, one a request and step."""
        self.num_drafted = 0
        """Tokens guessed so far."""
        self.num_accepted = 0
        """Those of them that were right."""

    @property
    def counts(self) -> tuple[int, int, int]:
        """What `base.Figures` tells of it."""
        return self.num_drafts, self.num_drafted, self.num_accepted

    def wants(self, num_requests: int) -> bool:
        """Whether `num_requests` at once should be answered with guesses."""
        return num_requests <= self._max_requests and self._level(num_requests).is_on

    def note(
        self, num_requests: int, is_guessing: bool | None, drafts: Sequence[tuple[int, int]], num_tokens: int, elapsed_s: float
    ) -> None:
        """Takes in a step that gave `num_tokens` to `num_requests`; `drafts` holds tokens guessed and accepted of each that had guesses.

        `is_guessing` is None where the step says nothing about speed: it read a prompt, or only some requests had their turn at guessing.
        """
        level = self._level(num_requests)
        for holder in (self, level):
            holder.num_drafts += len(drafts)
            holder.num_drafted += sum(num_drafted for num_drafted, _ in drafts)
            holder.num_accepted += sum(num_accepted for _, num_accepted in drafts)
        if is_guessing is not None and num_requests <= self._max_requests:
            level.note(is_guessing, num_tokens, elapsed_s, self._min_acceptance)

    def _level(self, num_requests: int) -> Level:
        return self._levels.setdefault(max(num_requests - 1, 0).bit_length(), Level())


def look_up(ids: Sequence[int], num_tokens: int, max_ngram_size: int) -> list[int]:
    """What followed when the last tokens stood together before: up to `num_tokens` after the latest place with the longest run of them.

    Source: the idea, Saxena, prompt lookup decoding (2023).
    """
    for size in range(min(max_ngram_size, len(ids) - 1), 0, -1):
        wanted = list(ids[len(ids) - size :])
        for start in range(len(ids) - size - 1, -1, -1):
            if list(ids[start : start + size]) == wanted:
                return list(ids[start + size : start + size + num_tokens])
    return []
