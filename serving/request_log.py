"""One JSON line a request, and one for each thing that went wrong; never a word of a prompt or an answer unless asked for."""

from __future__ import annotations

import json
import logging
import time
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

LOGGER_NAME = "slipway.serving"
MAX_FILE_BYTES = 50_000_000
NUM_OLD_FILES = 2


class JsonLine(logging.Formatter):
    """A record as JSON, with the fields given as `extra={"fields": {...}}`."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{moment}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "message": record.getMessage(),
        }
        return json.dumps(line | getattr(record, "fields", {}), ensure_ascii=False, default=str)


def write_to(folder: Path, replica: str) -> None:
    """Sends the log of this process to `folder/requests-REPLICA.jsonl`; old lines go when the file is full."""
    folder.mkdir(parents=True, exist_ok=True)
    handler = RotatingFileHandler(
        folder / f"requests-{replica}.jsonl", maxBytes=MAX_FILE_BYTES, backupCount=NUM_OLD_FILES, encoding="utf-8"
    )
    handler.setFormatter(JsonLine())
    logger = logging.getLogger(LOGGER_NAME)
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO)
