"""`slipway status` without a name: what a running server is doing, as a table or as JSON, once or again and again."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from pydantic import SecretStr
from rich.console import Console, Group, RenderableType
from rich.live import Live as LiveDisplay
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from infra.settings import load_settings
from pipelines import live
from pipelines import serve as serving_client

INTERVAL_S = 1.0
MAX_WIDTH = 10_000
COLUMNS = ("tokens/s", "first token", "between tokens", "running", "waiting", "KV cache", "prefix hits", "refused")


def show(url: str, as_json: bool, watch: bool) -> None:
    """`slipway status`: once, or with `watch` until Ctrl-C. Raises TransientError and ConfigError as `serving_client.figures`."""
    looks = _looks(url, load_settings().api_key)
    console = Console(highlight=False)
    try:
        if as_json or not watch or not console.is_terminal:
            for found in looks:
                if as_json:
                    print(json.dumps({"url": url, **asdict(found)}), flush=True)
                else:
                    console.print(_view(found, url, console))
                if not watch:
                    return
        with LiveDisplay(console=console, auto_refresh=False) as display:
            for found in looks:
                display.update(_view(found, url, console), refresh=True)
    except KeyboardInterrupt:
        if not watch:
            raise


def _looks(url: str, api_key: SecretStr | None) -> Iterator[live.Live]:
    """What happens at the server, every `INTERVAL_S`."""
    before = _look(url, api_key)
    while True:
        time.sleep(INTERVAL_S)
        after = _look(url, api_key)
        yield live.compare(before, after)
        before = after


def _look(url: str, api_key: SecretStr | None) -> live.Look:
    text = serving_client.figures(url, api_key)
    return live.read(text, time.monotonic())


def _view(found: live.Live, url: str, console: Console) -> RenderableType:
    """Everything for a person: a row a replica where the terminal is wide enough, and else a line a figure."""
    named = list(found.replicas.items())
    if len(named) != 1:
        named.append(("all", found.all))
    rows = [(name, _cells(figures)) for name, figures in named]
    title = Text(f"{', '.join(found.models) or 'no model'} at {url}, over {found.interval_s:.1f} s", "bold", overflow="fold")
    parts: list[RenderableType] = [title]
    if not found.replicas:
        parts.append(Text("no replica is running; the first request will wait for one", "yellow"))
    else:
        table = _wide(rows)
        needed = Measurement.get(console, console.options.update(max_width=MAX_WIDTH), table).maximum
        parts.append(table if needed <= console.width else _narrow(rows))
    if guessed := [f"{name} {_percent(figures.acceptance)}" for name, figures in named if figures.acceptance]:
        parts.append(Text(f"tokens guessed ahead that were right: {', '.join(guessed)}"))
    if found.front:
        parts.append(Text(_front_line(found.front)))
    if any("*" in cell.plain for _, cells in rows for cell in cells):
        parts.append(Text("* since the server started: nothing was measured in this interval", "dim"))
    return Group(*parts)


def _wide(rows: Sequence[tuple[str, Sequence[Text]]]) -> Table:
    table = Table("replica", box=None, pad_edge=False)
    for column in COLUMNS:
        table.add_column(column, justify="right", no_wrap=True)
    for name, cells in rows:
        table.add_row(Text(name, "bold" if name == "all" else "", no_wrap=True), *cells)
    return table


def _narrow(rows: Sequence[tuple[str, Sequence[Text]]]) -> Table:
    table = Table.grid(padding=(0, 2))
    for name, cells in rows:
        table.add_row(Text(name, "bold"), "")
        for column, cell in zip(COLUMNS, cells, strict=True):
            table.add_row(f"  {column}", cell)
    return table


def _cells(figures: live.Figures) -> list[Text]:
    hits = figures.prefix_hit_rate
    return [
        Text(f"{figures.made_tokens_per_s:.0f}", "" if figures.is_up else "red"),
        Text(_times(figures.ttft_s)),
        Text(_times(figures.itl_s)),
        Text(str(figures.num_running)),
        Text(str(figures.num_waiting), "yellow" if figures.num_waiting else ""),
        Text(f"{figures.kv_cache_usage:.0%}"),
        Text("-" if hits is None else _percent(hits)),
        Text(str(figures.num_refused), "red" if figures.refused_per_s else ""),
    ]


def _times(times: live.Times | None) -> str:
    """Median and 99th percentile."""
    if times is None:
        return "-"
    return f"{_duration(times.p50)} / {'>' if times.is_beyond else ''}{_duration(times.p99)}{_mark(times.over)}"


def _percent(share: live.Share) -> str:
    return f"{share.value:.0%}{_mark(share.over)}"


def _mark(over: live.Over) -> str:
    return "*" if over == "start" else ""


def _duration(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _front_line(front: live.Front) -> str:
    parts = [f"{front.num_held} held until a replica is ready"]
    for text, counts in (("asked again", front.retries), ("refused", front.refused)):
        causes = ", ".join(f"{cause} {num}" for cause, num in counts.items() if num)
        parts.append(f"{sum(counts.values())} {text}" + (f" ({causes})" if causes else ""))
    return f"front: {', '.join(parts)}"
