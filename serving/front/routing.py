"""Which replica gets a request.

- Of the replicas with a free place, the one that holds the longest part of the prompt in its cache, unless it has clearly more to do than
  another: a cached prefix saves its share of a prefill, a place in a fuller batch costs every token.
- Of an adapter, those that hold it come before the others: what they lack takes seconds to load there.
- Source of the trade: cache-aware routing in Zheng et al. 2024, "SGLang", arXiv 2312.07104.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Collection, Container, Sequence
from dataclasses import dataclass
from typing import Any

from serving.adapters import adapter_named
from serving.front.replicas import Replica

BLOCK_CHARS = 128
MAX_BLOCKS = 64
"""Of a prompt, at most this much counts: 8192 characters, beyond which two prompts that agree are the same conversation anyway."""
MAX_HELD_BLOCKS = 100_000
SPARE_REQUESTS = 4
"""How many more requests than the least busy one a replica may have and still be preferred for its cache."""


@dataclass(frozen=True)
class Wanted:
    """What of a request decides where it goes."""

    blocks: Sequence[bytes] = ()
    """Digests of the prompt's beginnings, each one block longer, apart for each adapter; empty where there is none to be read."""
    adapter: str | None = None


def read_wanted(body: bytes, model_name: str = "", adapters: Container[str] = ()) -> Wanted:
    """What a request's body asks for, on a model with these adapters."""
    try:
        asked = json.loads(body)
    except ValueError:
        return Wanted()
    if not isinstance(asked, dict):
        return Wanted()
    adapter = adapter_named(str(asked.get("model")), model_name, adapters)
    return Wanted(_blocks(_prompt_text(asked), adapter or ""), adapter)


def _blocks(text: str, adapter: str) -> list[bytes]:
    """Digests and not Python's hashes: who knows those could steer other people's requests."""
    digest, blocks = hashlib.blake2b(adapter.encode(), digest_size=16), []
    for start in range(0, min(len(text), BLOCK_CHARS * MAX_BLOCKS), BLOCK_CHARS):
        digest.update(text[start : start + BLOCK_CHARS].encode(errors="surrogatepass"))
        blocks.append(digest.digest())
    return blocks


def _prompt_text(asked: dict[str, Any]) -> str:
    prompt = asked.get("prompt")
    if isinstance(prompt, str):
        return prompt
    shown = [asked.get("tools"), asked.get("messages")] if prompt is None else prompt
    return json.dumps(shown)


class Router:
    """Remembers where the beginnings of prompts went, the least recently used forgotten first."""

    def __init__(self) -> None:
        self._holders: OrderedDict[bytes, str] = OrderedDict()

    def choose(self, candidates: Sequence[Replica], wanted: Wanted) -> Replica:
        """The replica of one pool for a request; `candidates` is not empty."""
        least_busy = _least_busy(candidates)
        max_running = least_busy.num_running + SPARE_REQUESTS
        if wanted.adapter is not None:
            candidates = [replica for replica in candidates if wanted.adapter in replica.standing.adapters]
            free = [replica for replica in candidates if replica.num_running < min(max_running, replica.standing.num_places)]
            least_busy = _least_busy(free) if free else least_busy
        chosen = self._holder(candidates, wanted.blocks, max_running) or least_busy
        self._note(wanted.blocks, chosen.name)
        return chosen

    def _holder(self, candidates: Collection[Replica], blocks: Sequence[bytes], max_running: int) -> Replica | None:
        """Who holds the longest part of the prompt and has room for more."""
        by_name = {replica.name: replica for replica in candidates}
        for block in reversed(blocks):
            replica = by_name.get(self._holders.get(block, ""))
            if replica is not None and replica.num_running < min(max_running, replica.standing.num_places):
                return replica
        return None

    def _note(self, blocks: Sequence[bytes], name: str) -> None:
        for block in blocks:
            self._holders[block] = name
            self._holders.move_to_end(block)
        while len(self._holders) > MAX_HELD_BLOCKS:
            self._holders.popitem(last=False)


def _least_busy(replicas: Sequence[Replica]) -> Replica:
    """Of those equally busy the one with the fewest adapters, so that they spread."""
    return min(replicas, key=lambda replica: (replica.num_running / replica.standing.num_places, len(replica.standing.adapters)))
