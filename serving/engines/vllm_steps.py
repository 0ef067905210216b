"""`python -m serving.engines.vllm_steps FD`: vLLM's engine, stepped by us, in a process of its own."""

from __future__ import annotations

import math
import random
import sys
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from vllm import EngineArgs, LLMEngine, SamplingParams
from vllm.exceptions import VLLMClientError
from vllm.inputs import tokens_input
from vllm.logprobs import Logprob
from vllm.lora.request import LoRARequest
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams
from vllm.usage.usage_lib import UsageContext

from serving.adapter_files import AdapterFiles, read_adapters
from serving.config import SpeculativeConfig
from serving.engines.base import Grammar, Sampling
from serving.engines.child import LARGER_THAN_CACHE, run_engine
from serving.engines.messages import News
from serving.engines.vllm import MAX_TOP_LOGPROBS
from serving.engines.vllm_corrections import allow_top_k_of_no_rows, spare_requests_without_adapter
from serving.engines.vllm_guesses import VllmGuesses, guesses_config

GREEDY_TEMPERATURE = 1e-4  # below this, dividing by the temperature leaves one token with all the mass
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Largest ranks of adapters that vLLM makes room for."""
LEAST_STEP_TOKENS = 2048  # of one step, by vLLM's own choice on any device; it wants no fewer than requests


@dataclass(slots=True)
class Request:
    """What is to be known of a request when it gets tokens."""

    tokens_left: int
    num_top: int | None
    """How many of the likeliest tokens are told; None where no log-probabilities are."""
    num_prompt: int
    """Tokens of its prompt, until it is known how many of them the prefix cache held; then 0."""
    can_guess: bool
    """Not with a seed: what is drawn would hang on which steps had guesses, and that on the load."""


class Adapters:
    """Adapters as vLLM names them, `max_held` of which it holds at once, the one unused longest going first."""

    def __init__(self, files: Mapping[str, AdapterFiles], max_held: int) -> None:
        self._requests = {
            name: LoRARequest(lora_name=name, lora_int_id=index, lora_path=each.folder)
            for index, (name, each) in enumerate(files.items(), start=1)
        }
        self._files = files
        self._max_held = max_held
        self._asked: OrderedDict[str, None] = OrderedDict()

    @property
    def held(self) -> Sequence[str]:
        """Those asked for last, which are those that vLLM holds."""
        return list(self._asked)

    def request(self, name: str | None) -> LoRARequest | None:
        """What to hand to vLLM for an answer of this adapter.

        Raises ValueError where it would have to be read and is not there: vLLM reads it in a step, which would fail for all requests.
        """
        if name is None:
            return None
        if name not in self._asked and not self._files[name].weights.is_file():
            raise ValueError(f"the adapter {name!r} cannot be loaded: {self._files[name].weights} is gone")
        self._asked[name] = None
        self._asked.move_to_end(name)
        if len(self._asked) > self._max_held:
            self._asked.popitem(last=False)
        return self._requests[name]


class Batch:
    """The requests in an engine, by their numbers; `cache_tokens` is set where its cache holds less than the model's whole context."""

    def __init__(self, engine: LLMEngine, adapters: Adapters, cache_tokens: int | None = None, guesses: VllmGuesses | None = None) -> None:
        self._engine = engine
        self._adapters = adapters
        self._cache_tokens = cache_tokens
        self._guesses = guesses
        self._scheduler = engine.engine_core.engine_core.scheduler  # in this very process: see VARIABLES
        self._requests: dict[int, Request] = {}
        self._prefix_asked_tokens = self._prefix_held_tokens = 0

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._requests)

    @property
    def figures(self) -> tuple[int, int, float, *tuple[int | None, ...]]:
        """The values of `base.Figures`, as of the last step."""
        num_running = len(self._scheduler.running)
        num_waiting, usage = len(self._requests) - num_running, self._scheduler.kv_cache_manager.usage
        guessed = self._guesses.counts if self._guesses else ()
        return num_running, num_waiting, usage, self._prefix_asked_tokens, self._prefix_held_tokens, *guessed

    @property
    def adapters(self) -> Sequence[str]:
        """Names of the adapters in memory."""
        return self._adapters.held

    def add(self, number: int, prompt_ids: list[int], sampling: Sampling) -> News | None:
        """Takes a request in; news only where vLLM refuses it."""
        if self._cache_tokens is not None and len(prompt_ids) >= self._cache_tokens:
            return number, [], None, None, LARGER_THAN_CACHE
        try:
            lora = self._adapters.request(sampling.adapter)
            self._engine.add_request(str(number), tokens_input(prompt_ids), sampling_params(sampling), lora_request=lora)
        except (ValueError, VLLMClientError) as error:  # refuses this one request; the others go on
            return number, [], None, None, f"the engine refuses this request: {error}"
        self._requests[number] = Request(
            sampling.max_tokens, sampling.logprobs, len(prompt_ids), can_guess=not sampling.temperature or sampling.seed is None
        )
        return None

    def cancel(self, number: int) -> None:
        """Forgets a request and frees its cache."""
        if self._requests.pop(number, None) is not None:
            self._engine.abort_request([str(number)])

    def clear(self) -> None:
        """Forgets all requests."""
        for number in list(self._requests):
            self.cancel(number)

    def step(self) -> list[News]:
        """Computes the next tokens and gives what each request got."""
        num_requests, is_steady = len(self._requests), all(not request.num_prompt for request in self._requests.values())
        if self._guesses:
            self._guesses.begin(num_requests, all(request.can_guess for request in self._requests.values()))
        outputs = self._engine.step()
        for output in outputs:
            self._count_prefix(self._requests[int(output.request_id)], output.num_cached_tokens or 0)
        news = [self._read(int(output.request_id), output.outputs[0]) for output in outputs]
        if self._guesses:
            self._guesses.end(num_requests, is_steady, sum(len(ids) for _, ids, *_ in news))
        return news

    def _count_prefix(self, request: Request, num_held: int) -> None:
        """Counts what the prefix cache held of a request's prompt, once."""
        if request.num_prompt:
            self._prefix_asked_tokens += request.num_prompt
            self._prefix_held_tokens += num_held
            request.num_prompt = 0

    def _read(self, number: int, output: Any) -> News:
        request, ids, reason = self._requests[number], list(output.token_ids), output.finish_reason
        request.tokens_left -= len(ids)
        if reason == "stop":
            ids.pop()  # the token that ended it
        told = None
        if request.num_top is not None:
            told = [told_logprobs(token, by_id, request.num_top) for token, by_id in zip(ids, output.logprobs or (), strict=False)]
        refusal = None
        if reason is not None:
            del self._requests[number]
            if reason == "length" and request.tokens_left and self._cache_tokens is not None:
                refusal = LARGER_THAN_CACHE
            elif reason not in ("stop", "length"):
                refusal = f"the engine gave this request up ({reason}), most likely for its grammar."
        return number, ids, told, None if refusal else reason, refusal


def told_logprobs(token: int, by_id: Mapping[int, Logprob], num_top: int) -> tuple[float, list[tuple[int, float]]]:
    """The log-probability of the chosen token, and of the `num_top` likeliest, best first; what a grammar ruled out is not told."""
    ranked = sorted((one.rank, other, one.logprob) for other, one in by_id.items() if one.rank is not None and one.rank <= num_top)
    return by_id[token].logprob, [(other, value) for _, other, value in ranked if value > -math.inf]


def sampling_params(sampling: Sampling) -> SamplingParams:
    """vLLM's own settings of one request. Raises VLLMClientError on what it does not take."""
    is_greedy = sampling.temperature < GREEDY_TEMPERATURE
    params = SamplingParams(
        max_tokens=sampling.max_tokens,
        temperature=0.0 if is_greedy else sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k or 0,
        min_p=sampling.min_p,
        seed=None if sampling.seed is None else sampling.seed % (1 << 63),
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        repetition_penalty=sampling.repetition_penalty,
        logprobs=sampling.logprobs,
        stop_token_ids=list(sampling.stop_ids),
        ignore_eos=sampling.grammar is None,  # a finished grammar leaves nothing but the end, whatever the stop ids are
        structured_outputs=structured_outputs(sampling.grammar),
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        skip_clone=True,
    )
    if not is_greedy:
        params.temperature = sampling.temperature  # it raises those below 0.01 to that
    return params


def structured_outputs(grammar: Grammar | None) -> StructuredOutputsParams | None:
    """The grammar in vLLM's form."""
    if grammar is None:
        return None
    return StructuredOutputsParams(json=grammar.text) if grammar.kind == "json_schema" else StructuredOutputsParams(regex=grammar.text)


def adapter_options(adapters: Mapping[str, AdapterFiles], max_held: int) -> dict[str, Any]:
    """vLLM's own settings of the room that it keeps for adapters."""
    if not adapters:
        return {}
    rank = next(each for each in RANKS if each >= max(files.rank for files in adapters.values()))
    return {"enable_lora": True, "max_loras": max_held, "max_cpu_loras": max_held, "max_lora_rank": rank}


def engine_options(model_dir: str, max_running_requests: int, cache_bytes: int) -> dict[str, Any]:
    """vLLM's own settings of all else."""
    return {
        "model": model_dir,
        "load_format": "safetensors",
        "use_tqdm_on_load": False,
        "generation_config": "vllm",  # no defaults of the model's own in place of what a request leaves out
        "seed": random.getrandbits(31),  # of requests without one: replicas must not give all users the same "random" answers
        "max_model_len": -1,
        "max_num_seqs": max_running_requests,
        "max_num_batched_tokens": max_running_requests if max_running_requests > LEAST_STEP_TOKENS else None,
        "kv_cache_memory_bytes": cache_bytes,
        "gpu_memory_utilization": 0.01,  # with the cache's size given it is but the least that must be free, by default nearly all
        "enable_prefix_caching": True,  # a shared system prompt is computed once
        "max_logprobs": MAX_TOP_LOGPROBS,
        "logprobs_mode": "raw_logprobs",  # the model's own
        "structured_outputs_config": {"backend": "xgrammar"},  # the first request would decide for all later ones
        "enforce_eager": current_platform.is_cpu(),  # there compiling takes minutes and gains little
        "disable_log_stats": True,
    }


def make_batch(
    model_dir: str,
    max_running_requests: int,
    cache_bytes: int,
    adapters: Mapping[str, Any] | None = None,
    max_adapters: int = 0,
    speculative: Mapping[str, Any] | None = None,
) -> Batch:
    """The batch of a base or merged model's folder, and of adapters on it. Raises what vLLM raises when it cannot read it.

    It computes in the dtype that the model has; only safetensors are read. A context that the cache cannot hold is cut to what it can.
    """
    # Where the processor has such a unit vLLM's attention uses it, and Linux ends a process that did not ask before (SIGILL).
    torch.cpu._init_amx()
    guessing = SpeculativeConfig.model_validate(speculative) if speculative else None
    files = read_adapters(adapters)
    if current_platform.is_cpu():
        spare_requests_without_adapter()
        allow_top_k_of_no_rows()
    config = EngineArgs(
        **engine_options(model_dir, max_running_requests, cache_bytes),
        **adapter_options(files, max_adapters),
        speculative_config=guesses_config(guessing) if guessing else None,
    ).create_engine_config(UsageContext.OPENAI_API_SERVER)  # whose defaults fit many requests at once
    context_tokens = config.model_config.max_model_len
    engine = LLMEngine.from_vllm_config(config, disable_log_stats=True)
    fitting_tokens = config.model_config.max_model_len  # the engine lowers it to what its cache holds
    scheduler = engine.engine_core.engine_core.scheduler
    guesses = VllmGuesses(scheduler, guessing) if guessing else None
    batch = Batch(engine, Adapters(files, max_adapters), fitting_tokens if fitting_tokens < context_tokens else None, guesses)
    batch.add(-1, [0], Sampling(max_tokens=1))  # what it cannot compute, some head sizes for example, shows with the first token only
    while batch.has_work:
        batch.step()
    return batch


if __name__ == "__main__":
    run_engine(int(sys.argv[1]), make_batch)
