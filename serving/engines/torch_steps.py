"""`python -m serving.engines.torch_steps FD`: a transformers model that answers requests in batches, in a process of its own.

- Requests that arrive together begin together, as one padded group with one key-value cache; those that come later form further groups.
- A step gives every group one token, and more where tokens guessed from the prompt turn out to be those that would have been chosen; a
  request that has ended leaves its group at once.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, DynamicCache
from transformers.utils import logging

from serving.adapter_files import AdapterFiles, read_adapters
from serving.config import EngineWeights, SpeculativeConfig
from serving.engines.adapter_batch import AdapterBatch
from serving.engines.base import Sampling
from serving.engines.child import Batch as AnyBatch
from serving.engines.child import run_engine
from serving.engines.messages import News
from serving.engines.sampler import Row, choose_while_right
from serving.engines.torch_adapters import AdapterLayers
from serving.speculation import Speculation, look_up


@dataclass
class Group:
    """Requests that began together; their tokens stand right-aligned, so that the next one has one place in all."""

    rows: list[Row]
    mask: torch.Tensor
    """(rows, tokens), 1 where a token stands and 0 where padding does."""
    next_ids: torch.Tensor
    """(rows, new tokens) that the model has not seen yet."""
    cache: DynamicCache = field(default_factory=DynamicCache)

    @property
    def has_begun(self) -> bool:
        """Whether the prompts have been read."""
        return bool(self.cache.get_seq_length())

    def append(self, guesses: Sequence[Sequence[int]]) -> int:
        """Puts guesses of all rows behind their next token; the most that a row has. Shorter ones are padded and masked."""
        width = max(map(len, guesses), default=0)
        if width:
            device = self.mask.device
            ids = [[*guess, *[0] * (width - len(guess))] for guess in guesses]
            seen = [[1] * len(guess) + [0] * (width - len(guess)) for guess in guesses]
            self.next_ids = torch.cat([self.next_ids, torch.tensor(ids, device=device)], dim=1)
            self.mask = torch.cat([self.mask, torch.tensor(seen, device=device)], dim=1)
        return width

    def forget(self, width: int, num_right: Sequence[int]) -> None:
        """Hides the last `width` tokens from each row but for its right guesses, and drops those that no row sees any more."""
        if not width:
            return
        seen = torch.arange(width) < torch.tensor(num_right)[:, None]
        self.mask[:, -width:] = seen.to(self.mask)
        if num_dropped := width - max(num_right):
            self.mask = self.mask[:, :-num_dropped]
            self.cache.crop(self.mask.shape[1])

    def keep(self, places: Sequence[int]) -> None:
        """Drops all rows but those at `places`."""
        if len(places) == len(self.rows):
            return
        index = torch.tensor(places, dtype=torch.long, device=self.mask.device)
        self.rows = [self.rows[place] for place in places]
        self.mask, self.next_ids = self.mask[index], self.next_ids[index]
        if places and self.has_begun:
            self.cache.batch_select_indices(index)


class Batch:
    """The requests of one model, up to `max_running_requests` of them at once; `prepared` surrounds whatever the model computes."""

    adapters: Sequence[str] = ()

    def __init__(
        self,
        model: Any,
        max_running_requests: int,
        prepared: Callable[[], AbstractContextManager[None]] = nullcontext,
        guessing: SpeculativeConfig | None = None,
    ) -> None:
        self._model = model
        self._prepared = prepared
        self._max_running = max_running_requests
        self._guessing = guessing
        self._speculation = Speculation(guessing.max_requests, guessing.min_acceptance) if guessing else None
        self._drafts: list[tuple[int, int]] = []
        self._waiting: dict[int, Row] = {}
        self._groups: list[Group] = []
        self._cancelled: set[int] = set()

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._waiting or self._groups)

    @property
    def figures(self) -> tuple[int, int, float, *tuple[int | None, ...]]:
        """The values of `base.Figures`; the cache has no bound of its own, so none of it is ever in use."""
        guessed = (None, None, *self._speculation.counts) if self._speculation else ()
        return self._num_running, len(self._waiting), 0.0, *guessed

    @property
    def _num_running(self) -> int:
        return sum(len(group.rows) for group in self._groups)

    def add(self, number: int, prompt_ids: list[int], sampling: Sampling) -> News | None:
        """Takes a request in; news only where it is refused."""
        if not prompt_ids:
            return number, [], None, None, "an empty prompt; at least one token is needed"
        self._waiting[number] = Row(number, prompt_ids, sampling)
        return None

    def cancel(self, number: int) -> None:
        """Forgets a request; the next step frees its cache."""
        if self._waiting.pop(number, None) is None:
            self._cancelled.add(number)

    def clear(self) -> None:
        """Forgets all requests."""
        self._waiting.clear()
        self._groups.clear()

    def step(self) -> list[News]:
        """Computes the next token of every request."""
        for group in self._groups:
            group.keep([place for place, row in enumerate(group.rows) if row.number not in self._cancelled])
        self._cancelled.clear()
        self._admit()
        num_requests, is_steady = self._num_running, all(group.has_begun for group in self._groups)
        is_guessing = self._speculation is not None and self._speculation.wants(num_requests)
        started_s = time.perf_counter()
        news: list[News] = []
        for group in self._groups:
            if group.rows:
                news += self._advance(group, is_guessing)
        self._groups = [group for group in self._groups if group.rows]
        if self._speculation is not None:
            elapsed_s, num_tokens = time.perf_counter() - started_s, sum(len(ids) for _, ids, *_ in news)
            self._speculation.note(num_requests, is_guessing if is_steady else None, self._drafts, num_tokens, elapsed_s)
            self._drafts = []
        return news

    def _admit(self) -> None:
        """Forms a group of the waiting requests that there is room for."""
        numbers = list(self._waiting)[: self._max_running - self._num_running]
        if not numbers:
            return
        rows = [self._waiting.pop(number) for number in numbers]
        width = max(len(row.prompt_ids) for row in rows)
        paddings = [width - len(row.prompt_ids) for row in rows]
        ids = [[0] * padding + row.prompt_ids for padding, row in zip(paddings, rows, strict=True)]
        mask = [[0] * padding + [1] * (width - padding) for padding in paddings]
        device = self._model.device
        self._groups.append(Group(rows, torch.tensor(mask, device=device), torch.tensor(ids, device=device)))

    def _advance(self, group: Group, is_guessing: bool) -> list[News]:
        """Tokens for every row of a group; rows that ended leave it."""
        guesses = [self._guess(row) if is_guessing and group.has_begun else [] for row in group.rows]
        width = group.append(guesses)
        positions = (group.mask.cumsum(-1) - 1).clamp(min=0)[:, -group.next_ids.shape[1] :]
        with torch.inference_mode(), self._prepared():
            output = self._model(
                input_ids=group.next_ids,
                attention_mask=group.mask,
                position_ids=positions,
                past_key_values=group.cache,
                logits_to_keep=1 + width,
            )
        logits = output.logits.float().cpu()
        chosen = [choose_while_right(row, logits[place], guess) for place, (row, guess) in enumerate(zip(group.rows, guesses, strict=True))]
        news, num_right = [one for one, _ in chosen], [right for _, right in chosen]
        self._drafts += [(len(guess), right) for guess, right in zip(guesses, num_right, strict=True) if guess]
        group.forget(width, num_right)
        group.next_ids = torch.tensor([[row.last_id] for row in group.rows], device=group.mask.device)
        group.mask = torch.cat([group.mask, group.mask.new_ones(len(group.rows), 1)], dim=1)
        group.keep([place for place, one in enumerate(news) if one[3] is None])
        return news

    def _guess(self, row: Row) -> list[int]:
        """What may follow the row's tokens, by what followed them before."""
        assert self._guessing is not None
        num_left = row.sampling.max_tokens - row.num_made - 1
        return look_up(row.ids, min(self._guessing.num_tokens, num_left), self._guessing.max_ngram_size)


def make_batch(
    model_dir: str,
    max_running_requests: int,
    weights: EngineWeights,
    num_threads: int | None,
    adapters: Mapping[str, Any] | None = None,
    max_adapters: int = 0,
    speculative: Mapping[str, Any] | None = None,
) -> AnyBatch:
    """The batch of a model's folder, and of adapters on it. Raises OSError or ValueError where transformers cannot read it."""
    if num_threads:
        torch.set_num_threads(num_threads)
    model = load_model(Path(model_dir), weights)
    guessing = SpeculativeConfig.model_validate(speculative) if speculative else None
    base = Batch(model, max_running_requests, guessing=guessing)
    return with_adapters(base, model, max_running_requests, read_adapters(adapters), max_adapters) if adapters else base


def load_model(model_dir: Path, weights: EngineWeights) -> Any:
    """The model of a base or merged folder. Raises OSError or ValueError when transformers cannot read it.

    On a CPU it computes in 32 bits, on a GPU in bfloat16; only safetensors are read.
    """
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    logging.get_logger("bitsandbytes").setLevel(logging.ERROR)  # it says of every layer and step that it rounds activations
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    options: dict[str, Any] = {"dtype": dtype, "use_safetensors": True, "local_files_only": True, "device_map": device}
    if weights == "int8":
        options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    elif weights == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    return AutoModelForCausalLM.from_pretrained(model_dir, **options).eval()


def with_adapters(base: Batch, model: Any, max_running_requests: int, adapters: Mapping[str, AdapterFiles], max_held: int) -> AdapterBatch:
    """The batch of a model and of adapters that share its weights."""
    layers = AdapterLayers(model)

    def load(name: str) -> Batch:
        return Batch(model, max_running_requests, partial(layers.put_on, layers.load(adapters[name])))

    return AdapterBatch(base, load, max_held)


if __name__ == "__main__":
    run_engine(int(sys.argv[1]), make_batch)
