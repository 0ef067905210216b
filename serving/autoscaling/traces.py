"""Loads to replay: when requests arrive, and how long their prompts and answers are.

The four named ones are synthetic: seeded random numbers in the shapes that loads have, not recordings of anybody's traffic. `read_trace`
takes a recording of one's own.
"""

from __future__ import annotations

import csv
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from infra.errors import ConfigError

PROMPT_TOKENS, ANSWER_TOKENS = (120, 0.8, 1024), (100, 0.6, 512)  # median, sigma of the logarithm, most
COLUMNS = ("arrival_s", "prompt_tokens", "output_tokens")
MAX_ROWS = 1_000_000


@dataclass(frozen=True, slots=True)
class Request:
    """One request of a trace."""

    arrival_s: float
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True)
class Trace:
    """Requests in the order in which they arrive."""

    name: str
    duration_s: float
    requests: tuple[Request, ...]
    bursts_s: tuple[float, ...] = ()
    """When the load jumps; from there reaction times are counted."""


def make_traces(seed: int = 0) -> list[Trace]:
    """The four synthetic traces; the same seed gives the same ones."""
    return [steady(seed), burst(seed), diurnal(seed), on_off(seed)]


def steady(seed: int) -> Trace:
    """Two requests a second for twenty minutes, which one replica of the measured speed answers with ease."""
    return _trace("steady", seed, 1200.0, lambda _: 2.0)


def burst(seed: int, burst_s: float = 120.3, num_streams: int = 31) -> Trace:
    """One stream at a time, then 31 more at once and twelve requests a second for two minutes: more than one replica can answer."""
    duration_s = 1200.0
    chance = random.Random(f"burst {seed}")
    calm = _arrivals(chance, duration_s, lambda now_s: 12.0 if burst_s <= now_s < burst_s + 120 else 0.5)
    at_once = [_request(chance, burst_s) for _ in range(num_streams)]
    return Trace("burst", duration_s, tuple(sorted([*calm, *at_once], key=lambda request: request.arrival_s)), (burst_s,))


def diurnal(seed: int) -> Trace:
    """A day in half an hour: from nearly nothing to fourteen requests a second and back, along a sine."""
    duration_s = 1800.0
    return _trace("diurnal", seed, duration_s, lambda now_s: 0.2 + 6.9 * (1 - math.cos(2 * math.pi * now_s / duration_s)))


def on_off(seed: int) -> Trace:
    """Ten requests a second for a minute, then none for four, six times over."""
    period_s, on_s, first_s = 300.0, 60.0, 30.2
    starts_s = tuple(first_s + period_s * index for index in range(6))
    trace = _trace("on_off", seed, 1830.0, lambda now_s: 10.0 if now_s >= first_s and (now_s - first_s) % period_s < on_s else 0.0)
    return Trace(trace.name, trace.duration_s, trace.requests, starts_s)


def read_trace(path: Path) -> Trace:
    """A trace from a CSV file with the columns `COLUMNS`. Raises ConfigError naming the first row that is none."""
    if not path.is_file():
        raise ConfigError(f"{path}: no such file. A CSV file with the columns {', '.join(COLUMNS)} is needed.")
    with path.open(newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        if not set(COLUMNS) <= set(rows.fieldnames or ()):
            raise ConfigError(f"{path}: its columns are {rows.fieldnames}; {', '.join(COLUMNS)} are needed.")
        requests = sorted(_rows(path, rows), key=lambda request: request.arrival_s)
    if not requests:
        raise ConfigError(f"{path}: it holds no requests; one row for each is needed.")
    return Trace(path.stem, requests[-1].arrival_s + 60.0, tuple(requests), (requests[0].arrival_s,))


def _rows(path: Path, rows: csv.DictReader[str]) -> Iterator[Request]:
    for number, row in enumerate(rows, start=2):
        try:
            request = Request(float(row["arrival_s"]), int(row["prompt_tokens"]), int(row["output_tokens"]))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{path} line {number}: {row}: numbers are needed ({error}).") from error
        if not (0 <= request.arrival_s < math.inf and request.prompt_tokens > 0 and request.output_tokens > 0 and number <= MAX_ROWS):
            raise ConfigError(f"{path} line {number}: {row}: a time from 0 on, at least one token each, and at most {MAX_ROWS} rows.")
        yield request


def _trace(name: str, seed: int, duration_s: float, rate: Callable[[float], float]) -> Trace:
    return Trace(name, duration_s, tuple(_arrivals(random.Random(f"{name} {seed}"), duration_s, rate)))


def _arrivals(chance: random.Random, duration_s: float, rate: Callable[[float], float], highest: float = 16.0) -> Iterator[Request]:
    """Arrivals that know nothing of each other, at `rate` a second: those of the highest rate, thinned out."""
    now_s = chance.expovariate(highest)
    while now_s < duration_s:
        if chance.random() < rate(now_s) / highest:
            yield _request(chance, now_s)
        now_s += chance.expovariate(highest)


def _request(chance: random.Random, arrival_s: float) -> Request:
    prompt, answer = (
        max(1, min(most, round(chance.lognormvariate(math.log(median), sigma)))) for median, sigma, most in (PROMPT_TOKENS, ANSWER_TOKENS)
    )
    return Request(arrival_s, prompt, answer)
