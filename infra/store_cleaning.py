"""Takes plain files that no run refers to any more out of the artifact store; artifacts stay.

- A file is in use while anything below `staging/` or `runs/` names its sha256: an order has what its program reads, a result what it made.
- Between a file's push and the order that names it nothing does, so a young file stays, and pushing an old one makes it young again.
- Who cleans may be one of several, and runs may be under way. What is left is the moment between the last look at a file's age and its
  removal: who pushes it in that very moment is told that it is absent, and the same command pushes it again.
"""

from __future__ import annotations

import re

from infra.artifact_store import FILES, ORDER_PLACES, UNUSED_S, ArtifactStore

CLEANED = "cleaned"
"""A file that is written for its time: clocks of drivers differ, and the store's own is the one that its files' times are of."""
SHA256 = re.compile(rb"\b[0-9a-f]{64}\b")


def clean_files(store: ArtifactStore, unused_s: float = UNUSED_S) -> list[str]:
    """Removes every plain file that nothing refers to and that is older than `unused_s`; sha256 of each, sorted.

    Raises what the store does when it is away.
    """
    place = store.place
    found = place.names(FILES)
    if not found:
        return []
    place.write(CLEANED, b"")
    now_s, in_use = place.modified_s(CLEANED), files_in_use(store)
    removed = []
    for sha256 in sorted(set(found) - in_use):
        made_s = place.modified_s(f"{FILES}/{sha256}")
        if made_s is not None and now_s is not None and now_s - made_s > unused_s:
            place.remove(f"{FILES}/{sha256}")
            removed.append(sha256)
    return removed


def files_in_use(store: ArtifactStore) -> set[str]:
    """Every sha256 that orders and results name, whichever version of Slipway wrote them; they lie in the folder of their slot itself."""
    below = [f"{top}/{name}" for top in ORDER_PLACES for name in store.place.names(top)]
    told = [name for name in below if name.endswith(".json") and name.count("/") == 2]
    return {sha256.decode() for name in told for sha256 in SHA256.findall(store.place.read(name) or b"")}
