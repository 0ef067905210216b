"""The worker as an actor of Ray Data, whose calls each bring one part; they all meet on one event loop."""

from __future__ import annotations

import asyncio
import threading

import pyarrow

from serving.batch.folder import Settings
from serving.batch.parts import Part
from serving.batch.recovery import Keeper
from serving.batch.worker import Worker, make_gate
from serving.config import BatchJob
from serving.opening import make_service


class PartAnswerer:
    """One engine; its calls wait in threads of Ray's while it answers."""

    def __init__(self, job_json: str, settings_json: str) -> None:
        job, settings = BatchJob.model_validate_json(job_json), Settings.model_validate_json(settings_json)
        limits = job.serve
        self._keeper = Keeper(lambda: make_service(job.model_dir, job.model_name, limits, make_gate(limits)))
        self._worker = Worker(self._keeper, limits, settings, job.output_dir)
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="answers", daemon=True).start()
        # What goes wrong at the start is told to the first part: an error in here would reach the driver as text.
        self._started = asyncio.run_coroutine_threadsafe(self._keeper.service(), self._loop)
        self._notes = asyncio.run_coroutine_threadsafe(self._worker.keep_notes(), self._loop)

    def __call__(self, parts: pyarrow.Table) -> pyarrow.Table:
        """Answers and writes the parts. Raises SlipwayError, as the worker does."""
        self._started.result()
        for row in parts.to_pylist():
            asyncio.run_coroutine_threadsafe(self._worker.answer(Part(**row)), self._loop).result()
        return parts.select(["number"])
