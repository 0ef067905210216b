"""Requests on a model and on adapters of it, as one batch: one batch of the library's for each adapter that is in memory.

- A step steps all of them, so that a batch never mixes adapters and each has a prefix cache of its own.
- At most so many are held. Room is made by the one unused longest, as soon as nothing runs on it.
- One that is not held is loaded in a thread, while the others go on.
- While one waits for room, later requests for those that are held wait behind it, so that no adapter is kept out by another that is always
  asked for; all that wait for the same one begin together.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

from serving.engines.base import Sampling
from serving.engines.child import Batch
from serving.engines.messages import News

LOOK_S = 0.01  # between two looks for new requests while nothing can be computed


class AdapterBatch:
    """`base` answers without an adapter; `load` makes the batch of an adapter by name, for at most `max_held` of them at once."""

    def __init__(self, base: Batch, load: Callable[[str], Batch], max_held: int) -> None:
        self._base = base
        self._load = load
        self._max_held = max_held
        self._held: OrderedDict[str, Batch] = OrderedDict()  # the one unused longest first
        self._waiting: dict[int, tuple[str, list[int], Sampling]] = {}  # in the order of their arrival
        self._running: dict[int, str] = {}
        self._loading: tuple[str, Future[Batch]] | None = None
        self._loader = ThreadPoolExecutor(1)

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._waiting) or any(batch.has_work for batch in self._batches)

    @property
    def figures(self) -> tuple[int, int, float]:
        """Requests running and waiting, and the share of the whole cache in use, as of the last step."""
        told = [batch.figures for batch in self._batches]
        num_waiting = sum(one[1] for one in told) + len(self._waiting)
        return sum(one[0] for one in told), num_waiting, sum(one[2] for one in told) / (1 + self._max_held)

    @property
    def adapters(self) -> Sequence[str]:
        """Names of the adapters in memory."""
        return list(self._held)

    def add(self, number: int, prompt_ids: list[int], sampling: Sampling) -> News | None:
        """Takes a request in; news only where it is refused."""
        name = sampling.adapter
        if name is None:
            return self._base.add(number, prompt_ids, sampling)
        if name in self._held and not self._lacks_room:
            return self._begin(name, number, prompt_ids, sampling)
        self._waiting[number] = (name, prompt_ids, sampling)
        return None

    def cancel(self, number: int) -> None:
        """Forgets a request."""
        if self._waiting.pop(number, None) is not None:
            return
        name = self._running.pop(number, None)
        (self._base if name is None else self._held[name]).cancel(number)

    def clear(self) -> None:
        """Frees what the running requests hold."""
        self._waiting.clear()
        for batch in self._batches:
            batch.clear()

    def step(self) -> list[News]:
        """Computes the next tokens of all batches and gives what each request got."""
        news = self._admit()
        busy = [batch for batch in self._batches if batch.has_work]
        for batch in busy:
            news += batch.step()
        for number, *_, finish_reason, refusal in news:
            if finish_reason or refusal:
                self._running.pop(number, None)
        if not busy and self._loading is not None:
            wait([self._loading[1]], LOOK_S)
        return news

    @property
    def _lacks_room(self) -> bool:
        """Whether an adapter that is waited for can be held only once another is dropped."""
        loading = {self._loading[0]} if self._loading else set()
        wanted = {name for name, *_ in self._waiting.values()} - loading - set(self._held)
        return len(self._held) + len(loading) + len(wanted) > self._max_held

    @property
    def _batches(self) -> list[Batch]:
        return [self._base, *self._held.values()]

    def _admit(self) -> list[News]:
        """Lets the requests begin whose adapter is held or can be fetched, in the order of their arrival; gives those refused."""
        news: list[News] = []
        while self._waiting:
            name = next(iter(self._waiting.values()))[0]
            problem = None if name in self._held else self._fetch(name)
            if problem is None and name not in self._held:
                break
            for number, (wanted, prompt_ids, sampling) in list(self._waiting.items()):
                if wanted != name:
                    continue
                del self._waiting[number]
                refused = (number, [], None, None, problem) if problem else self._begin(name, number, prompt_ids, sampling)
                news += [refused] if refused else []
        return news

    def _fetch(self, name: str) -> str | None:
        """Brings an adapter nearer to being held: makes room, begins to load it, takes in what was loaded; why it cannot be, if so."""
        if self._loading is None and self._make_room():
            self._loading = (name, self._loader.submit(self._load, name))
        if self._loading is None or not self._loading[1].done():
            return None
        (loaded, future), self._loading = self._loading, None
        try:
            self._held[loaded] = future.result()
        except Exception as error:  # a library's edge: an adapter that cannot be loaded must not end the answers of the others
            return f"the adapter {loaded!r} cannot be loaded: {error}" if loaded == name else None
        return None

    def _make_room(self) -> bool:
        """Whether one more may be held, after one on which nothing runs has been dropped where need be."""
        if len(self._held) < self._max_held:
            return True
        idle = next((name for name, batch in self._held.items() if not batch.has_work), None)
        if idle is not None:
            del self._held[idle]
        return idle is not None

    def _begin(self, name: str, number: int, prompt_ids: list[int], sampling: Sampling) -> News | None:
        self._held.move_to_end(name)
        refused = self._held[name].add(number, prompt_ids, sampling)
        if refused is None:
            self._running[number] = name
        return refused
