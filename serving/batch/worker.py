"""Answers parts with one engine, many at a time, so that it never waits at the end of a part.

- Rows are read in order, part after part; as many as the engine runs wait with their tokens ready, and take its places the moment they
  are free.
- A part is written when its last answer is there; those after it have long been running by then.
- A row that cannot be answered is a row with an error; only an engine that cannot go on ends the work.
"""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from pathlib import Path

from infra.errors import SlipwayError
from serving.admission import Claim, Gate
from serving.batch.answers import AnswerRow, Tally, answer_row, error_row, tally_of, write_part
from serving.batch.folder import BatchFolder, Settings
from serving.batch.journal import Journal, Note
from serving.batch.parts import Part
from serving.batch.reading import Row, RowReader
from serving.batch.recovery import Keeper, RequestFailedError
from serving.batch.requests import Asked, read_request, row_id
from serving.choice import Piece
from serving.config import ServeConfig
from serving.errors import ApiError
from serving.openai_format import AnswerFormat, Usage
from serving.openai_schema import ChatRequest
from serving.service import Service

NOTE_INTERVAL_S = 1.0
CLAIM = Claim(key="", weight=1.0, priority=0, num_prompt=0)


def open_rows(limits: ServeConfig) -> int:
    """How many rows one engine has in hand: those that run, and as many that are ready to."""
    return 2 * limits.max_running_requests


def make_gate(limits: ServeConfig) -> Gate:
    """The gate in front of one engine, with room for all rows in hand."""
    return Gate(limits.max_running_requests, open_rows(limits) - limits.max_running_requests)


def open_parts(limits: ServeConfig, rows_per_part: int) -> int:
    """How many parts one engine has in hand: those that these rows are of, and some that wait for the longest of their answers."""
    return -(-open_rows(limits) // rows_per_part) + 7


class Worker:
    """One engine with the parts it is answering."""

    def __init__(self, keeper: Keeper, limits: ServeConfig, settings: Settings, output_dir: Path) -> None:
        self._keeper = keeper
        self._settings = settings
        self._folder = BatchFolder(output_dir)
        self._journal = Journal(self._folder.work)
        self._reader = RowReader(settings.max_body_bytes)
        self._reading = asyncio.Lock()
        self._places = asyncio.Semaphore(open_rows(limits))
        self._open: dict[int, Tally] = {}

    async def answer(self, part: Part) -> None:
        """Answers a part and writes it. Raises ConfigError where it cannot be read, ArtifactError or EngineError where the engine fails."""
        tally = self._open[part.number] = Tally()
        tasks: list[asyncio.Task[AnswerRow]] = []
        try:
            async with asyncio.TaskGroup() as group, self._reading:
                self._journal.write([Note(part.number, tally, is_done=False)])
                for number, row in enumerate(self._reader.read(part), start=part.first_row):
                    await self._places.acquire()
                    tasks.append(group.create_task(self._row(number, row, tally)))
        except* SlipwayError as failed:
            raise failed.exceptions[0] from None
        finally:
            del self._open[part.number]
        path, rows = self._folder.part_file(part, self._settings), [task.result() for task in tasks]
        self._journal.write([Note(part.number, tally, is_done=True)])
        await asyncio.to_thread(write_part, path, rows, self._settings.format)

    async def keep_notes(self) -> None:
        """Notes every second, until it is cancelled, how far the open parts are."""
        noted: dict[int, int] = {}
        while True:
            await asyncio.sleep(NOTE_INTERVAL_S)
            fresh = {number: tally for number, tally in self._open.items() if tally.rows != noted.get(number, 0)}
            noted = {number: tally.rows for number, tally in self._open.items()}
            if fresh:
                self._journal.write(Note(number, tally, is_done=False) for number, tally in fresh.items())

    async def _row(self, number: int, row: Row | ApiError, tally: Tally) -> AnswerRow:
        """What becomes of one row; its place is free again in the end."""
        try:
            answered = await self._answered(number, row)
        finally:
            self._places.release()
        tally.add(tally_of(answered))
        return answered

    async def _answered(self, number: int, row: Row | ApiError) -> AnswerRow:
        if isinstance(row, ApiError):
            return error_row(number, None, row)
        custom_id = row_id(row)
        try:
            asked = read_request(row, self._settings.model_name, self._settings.ignored_fields)
            body = await self._keeper.ask(lambda service: ask(service, asked))
        except ApiError as error:
            return error_row(number, custom_id, error)
        except RequestFailedError as error:
            return error_row(number, custom_id, ApiError(str(error), 500, code="engine_failed"))
        except SlipwayError:
            raise
        except Exception as error:  # a process edge, as in the server: one row must never end the run, whatever is wrong with it
            return error_row(number, custom_id, ApiError(f"the worker failed on this request: {type(error).__name__}", 500))
        return answer_row(number, custom_id, body, asked.has_full_answer)


async def ask(service: Service, asked: Asked) -> dict[str, object]:
    """The body that the server would answer with. Raises ApiError where it would."""
    request = asked.request
    order = await (service.chat_order(request) if isinstance(request, ChatRequest) else service.completion_order(request))
    pieces: list[Piece] = []
    async with aclosing(service.answer(order, CLAIM)) as answer:
        async for piece in answer:
            pieces.append(piece)
    usage = Usage(len(order.prompt_ids), sum(piece.num_tokens for piece in pieces))
    return AnswerFormat(asked.endpoint, service.model.named(request.model), includes_usage=False).body(pieces, usage)
