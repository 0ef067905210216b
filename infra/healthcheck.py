"""Asks a server whether it answers, for an image's HEALTHCHECK: `python -m infra.healthcheck URL` exits 0 where it does, else 1.

The standard library is all that it imports: it is started every few seconds, beside an engine.
"""

from __future__ import annotations

import sys
import urllib.error
import urllib.request

TIMEOUT_S = 4.0


def is_healthy(url: str, timeout_s: float = TIMEOUT_S) -> bool:
    """Whether `url` answers with 200 in time."""
    try:
        with urllib.request.urlopen(url, timeout=timeout_s) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError) as error:
        print(f"{url}: {error}", file=sys.stderr)
        return False


if __name__ == "__main__":
    sys.exit(not is_healthy(sys.argv[1]))
