"""Which replica gets a request.

- Of the replicas with a free place, the one that holds the longest part of the prompt in its cache, unless it has clearly more to do than
  another: a cached prefix saves its share of a prefill, a place in a fuller batch costs every token.
- Source of the trade: cache-aware routing in Zheng et al. 2024, "SGLang", arXiv 2312.07104.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Collection, Sequence
from typing import Any

from serving.front.replicas import Replica

BLOCK_CHARS = 128
MAX_BLOCKS = 64
"""Of a prompt, at most this much counts: 8192 characters, beyond which two prompts that agree are the same conversation anyway."""
MAX_HELD_BLOCKS = 100_000
SPARE_REQUESTS = 4
"""How many more requests than the least busy one a replica may have and still be preferred for its cache."""


def prompt_blocks(body: bytes) -> list[bytes]:
    """Digests of the prompt's beginnings, each one block longer; empty where there is none to be read.

    Digests and not Python's hashes: who knows those could steer other people's requests.
    """
    try:
        asked = json.loads(body)
    except ValueError:
        return []
    if not isinstance(asked, dict):
        return []
    text = _prompt_text(asked)
    digest, blocks = hashlib.blake2b(digest_size=16), []
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

    def choose(self, candidates: Sequence[Replica], blocks: Sequence[bytes]) -> Replica:
        """The replica of one pool for a prompt; `candidates` is not empty."""
        least_busy = min(candidates, key=lambda replica: replica.num_running / replica.standing.num_places)
        chosen = self._holder(candidates, blocks, least_busy.num_running + SPARE_REQUESTS) or least_busy
        self._note(blocks, chosen.name)
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
