"""`python -m serving.engines.openvino_steps FD`: OpenVINO GenAI's continuous batching in a process of its own."""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
import openvino
import openvino_genai

from infra.files import read_json
from infra.model_sizes import head_size
from serving.adapter_files import AdapterFiles, read_adapters
from serving.engines.adapter_batch import AdapterBatch
from serving.engines.base import Sampling
from serving.engines.child import LARGER_THAN_CACHE, run_engine
from serving.engines.child import Batch as AnyBatch
from serving.engines.lanes import GUESSED_SHARE, Lanes
from serving.engines.memory import giving_back_freed_heap, release_start_memory
from serving.engines.messages import News
from serving.engines.openvino_device import device_properties

GREEDY_TEMPERATURE = 1e-4  # below this, dividing by the temperature leaves one token with all the mass
MODEL_NAME = "openvino_model.xml"
BLOCK_TOKENS = 32  # of the processor's plugin
VALUE_SCALE_BYTES = KEY_SCALE_BYTES = 8  # two fp32 numbers
# A key's numbers get their scale from the token, not from the block: there a wrong guess would change how the right ones beside it are
# rounded, and answers with guesses differ from those without.
KEYS_BY_TOKEN = {"KEY_CACHE_QUANT_MODE": "BY_TOKEN"}
MAX_MIN_P = 1 - 1e-6  # it refuses 1, which leaves the likeliest token


class Batch:
    """The requests in a pipeline, by their numbers; `guesses` joins the library's settings of each."""

    adapters: Sequence[str] = ()

    def __init__(self, pipeline: Any, guesses: Mapping[str, int] | None = None) -> None:
        self.pipeline = pipeline
        self._guesses = guesses or {}
        self._handles: dict[int, Any] = {}
        self._samplings: dict[int, Sampling] = {}

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self.pipeline.has_non_finished_requests())

    @property
    def figures(self) -> tuple[int, int, float]:
        """Requests running and waiting, and the share of the cache in use, as of the last step."""
        metrics = self.pipeline.get_metrics()
        num_running = min(metrics.scheduled_requests, len(self._handles))
        return num_running, len(self._handles) - num_running, metrics.cache_usage / 100

    def add(self, number: int, prompt_ids: list[int], sampling: Sampling) -> News | None:
        """Takes a request in; news only where the pipeline refuses it."""
        ids = openvino.Tensor(numpy.asarray([prompt_ids], dtype=numpy.int64))
        try:
            self._handles[number] = self.pipeline.add_request(number, ids, generation_config(sampling, self._guesses))
        except (RuntimeError, TypeError, ValueError) as error:  # refuses this one request; the others go on
            return number, [], None, None, f"the engine refuses this request: {error}"
        self._samplings[number] = sampling
        return None

    def cancel(self, number: int) -> None:
        """Forgets a request; the next step frees its cache."""
        if handle := self._forget(number):
            handle.cancel()

    def clear(self) -> None:
        """Frees what the running requests hold; the pipeline's destructor reports it as a leak otherwise."""
        for number in list(self._handles):
            self.cancel(number)
        if self.has_work:
            self.pipeline.step()

    def step(self) -> list[News]:
        """Computes the next tokens and gives what each request got."""
        self.pipeline.step()
        news = [self._read(number) for number, handle in self._handles.items() if has_news(handle)]
        for number, *_, finish_reason, refusal in news:
            if finish_reason or refusal:
                self._forget(number)
        return news

    def _forget(self, number: int) -> Any:
        self._samplings.pop(number, None)
        return self._handles.pop(number, None)

    def _read(self, number: int) -> News:
        handle, sampling = self._handles[number], self._samplings[number]
        ids: list[int] = []
        logprobs: list[Any] = []
        reason = openvino_genai.GenerationFinishReason.NONE
        while handle.can_read():
            for output in handle.read().values():  # one sequence, or none where the request was dropped
                ids += output.generated_ids
                logprobs += output.generated_log_probs
                reason = output.finish_reason
        if reason == openvino_genai.GenerationFinishReason.STOP and ids and ids[-1] in sampling.stop_ids:
            ids.pop()
        told = [(value, ()) for value in logprobs[: len(ids)]] if sampling.logprobs is not None else None
        if reason != openvino_genai.GenerationFinishReason.NONE:
            return number, ids, told, "length" if reason == openvino_genai.GenerationFinishReason.LENGTH else "stop", None
        if handle.get_status() != openvino_genai.GenerationStatus.RUNNING:
            return number, ids, told, None, LARGER_THAN_CACHE
        return number, ids, told, None, None


def has_news(handle: Any) -> bool:
    """Whether a request has new tokens or has ended."""
    return bool(handle.can_read() or handle.get_status() != openvino_genai.GenerationStatus.RUNNING)


def generation_config(sampling: Sampling, guesses: Mapping[str, int]) -> Any:
    """The library's own settings of one request."""
    is_greedy = sampling.temperature < GREEDY_TEMPERATURE
    config = openvino_genai.GenerationConfig(
        max_new_tokens=sampling.max_tokens,
        do_sample=not is_greedy,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        repetition_penalty=sampling.repetition_penalty,
        logprobs=0 if sampling.logprobs is None else 1,  # it tells the chosen token's, and no more
        stop_token_ids=set(sampling.stop_ids),
        ignore_eos=not sampling.stop_ids,
        **guesses,
    )
    if sampling.grammar is not None:
        config.structured_output_config = openvino_genai.StructuredOutputConfig(**{sampling.grammar.kind: sampling.grammar.text})
    if not is_greedy:
        config.temperature = sampling.temperature
        config.top_p = sampling.top_p
        config.min_p = min(sampling.min_p, MAX_MIN_P)
        # OpenVINO starts every request at seed 0, which would give all users the same "random" answer.
        config.rng_seed = random.getrandbits(64) if sampling.seed is None else sampling.seed % (1 << 64)
        if sampling.top_k is not None:
            config.top_k = sampling.top_k
    return config


def cache_blocks(cache_gb: float, *configs: dict[str, Any], has_keys_by_token: bool = False) -> int:
    """Blocks of the KV cache, each with its part for every model, that `cache_gb` GB hold, at least one; the library itself takes whole GB.

    Keys and values are 8-bit numbers. Beside those of a head each token has a scale and a zero point for its value, and each block of keys
    one pair a channel (or a token): 12 bytes a token and head on average with heads of 64, which is what the library's own division of
    1 GB comes to.
    """
    block_bytes = 0
    for config in configs:
        head_dim, num_heads = head_size(config), config["num_attention_heads"]
        key_scale_bytes = KEY_SCALE_BYTES if has_keys_by_token else KEY_SCALE_BYTES * head_dim // BLOCK_TOKENS
        per_token = 2 * head_dim + VALUE_SCALE_BYTES + key_scale_bytes
        block_bytes += BLOCK_TOKENS * config["num_hidden_layers"] * config.get("num_key_value_heads", num_heads) * per_token
    return max(1, int(cache_gb * (1 << 30)) // block_bytes)


def load(
    model_dir: str,
    max_running_requests: int,
    cache_gb: float,
    num_threads: int | None,
    precision: str = "f32",
    adapter: AdapterFiles | None = None,
) -> Any:
    """The pipeline of a model folder, for good with this adapter if any. Raises RuntimeError when OpenVINO cannot read it.

    The library takes an adapter a request too, and gives an answer without it: `add_request` does not read that setting, and what does,
    `generate`, wants the same one of all requests. The adapter's product is added in 32 bits to that of the 8-bit weights.
    """
    scheduler = scheduling(cache_blocks(cache_gb, read_json(Path(model_dir) / "config.json")), max_running_requests)
    properties = device_properties(Path(model_dir), num_threads, precision)
    if adapter is not None:
        loaded = openvino_genai.Adapter(adapter.weights)
        properties["adapters"] = openvino_genai.AdapterConfig(loaded, adapter.scale, openvino_genai.AdapterConfig.Mode.MODE_STATIC)
    return openvino_genai.ContinuousBatchingPipeline(model_dir, scheduler, "CPU", properties)


def scheduling(num_blocks: int, max_running_requests: int) -> Any:
    """The library's own settings of a cache and what runs in it."""
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.num_kv_blocks = num_blocks
    scheduler.max_num_seqs = max_running_requests
    scheduler.enable_prefix_caching = True  # a shared system prompt is computed once
    return scheduler


def make_batch(
    adapters: Mapping[str, Any] | None = None, max_adapters: int = 0, speculative: Mapping[str, Any] | None = None, **settings: Any
) -> AnyBatch:
    """The batch of a model folder, and of adapters on it or with guesses, ready to answer.

    Raises RuntimeError when OpenVINO cannot read it, ValueError on an adapter that does not fit it.
    """
    if speculative is not None:
        return make_lanes(speculative, **settings)
    files = read_adapters(adapters)
    settings["cache_gb"] /= 1 + max_adapters
    base = ready_batch(**settings)
    if not files:
        return base
    model = (Path(settings["model_dir"]) / MODEL_NAME).read_text()
    for name, adapter in files.items():
        require_layers(name, adapter, model)
    return AdapterBatch(base, lambda name: ready_batch(**settings, adapter=files[name]), max_adapters)


def ready_batch(**settings: Any) -> Batch:
    """The batch of one pipeline, after its first token, without what of the file it no longer needs."""
    batch = Batch(load(**settings))
    warm_up(batch)
    release_start_memory()
    return batch


def make_lanes(
    told: Mapping[str, Any], model_dir: str, max_running_requests: int, cache_gb: float, num_threads: int | None, precision: str
) -> Lanes:
    """The same with guesses: a pipeline guesses for all its requests or for none, so there are two, each with its part of the cache."""
    from serving.config import SpeculativeConfig  # with pydantic: 13 MB and 0.3 s, which a process without guesses is spared

    speculative = SpeculativeConfig.model_validate(told)
    folders = [Path(model_dir), *([speculative.draft_model_dir] if speculative.draft_model_dir else [])]
    configs = [read_json(folder / "config.json") for folder in folders]
    properties, *of_draft = ({**device_properties(folder, num_threads, precision), **KEYS_BY_TOKEN} for folder in folders)
    num_blocks = cache_blocks(cache_gb * (1 - GUESSED_SHARE), configs[0], has_keys_by_token=True)
    plain = openvino_genai.ContinuousBatchingPipeline(model_dir, scheduling(num_blocks, max_running_requests), "CPU", properties)
    num_blocks = cache_blocks(cache_gb * GUESSED_SHARE, *configs, has_keys_by_token=True)
    scheduler = scheduling(num_blocks, speculative.max_requests)
    scheduler.max_num_batched_tokens = max(scheduler.max_num_batched_tokens, speculative.max_requests * (1 + speculative.num_tokens))
    guesses = {"num_assistant_tokens": speculative.num_tokens}
    if speculative.draft_model_dir is None:
        guesses["max_ngram_size"] = speculative.max_ngram_size
        source = {"prompt_lookup": True}
    else:
        draft = openvino_genai.draft_model(speculative.draft_model_dir, "CPU", scheduler_config=scheduler, **of_draft[0])
        source = {"draft_model": draft}
    guessing = openvino_genai.ContinuousBatchingPipeline(model_dir, scheduler, "CPU", {**properties, **source})
    batches = Batch(plain), Batch(guessing, guesses)
    for batch in batches:
        warm_up(batch)
    release_start_memory()
    return Lanes(*batches, speculative, num_blocks, BLOCK_TOKENS)


def warm_up(batch: Batch) -> None:
    """One token, at which the library lays the weights out anew for its kernels; what it read them from is not touched again."""
    batch.add(0, [0], Sampling(max_tokens=1, stop_ids=()))
    while batch.has_work:
        batch.step()


def require_layers(name: str, adapter: AdapterFiles, model: str) -> None:
    """Raises ValueError where an adapter changes a layer that the text of a model lacks; the library passes over it with a warning."""
    if unknown := sorted(module for module in adapter.modules if f'"__module.{module}/' not in model):
        raise ValueError(f"the adapter {name!r} changes {unknown[:3]}, which the exported model lacks. Quantize its base again.")


if __name__ == "__main__":
    with giving_back_freed_heap():
        run_engine(int(sys.argv[1]), make_batch)
