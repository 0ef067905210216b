"""What every engine must do, on a real, small model; an engine joins by a line in ENGINES. All of it holds with guesses too.

vLLM lives in a venv of its own, so its part is marked: `make test-vllm` runs it.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Coroutine, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import psutil
import pytest

from infra.chat import ChatCodec, load_codec
from infra.errors import ArtifactError, ConfigError
from serving.admission import Claim, Gate
from serving.choice import Order
from serving.config import ServeConfig, SpeculativeConfig
from serving.engines.base import Engine, EngineError, Grammar, RequestRefusedError, Sampling, TokenLogprob
from serving.engines.registry import make_engine
from serving.errors import ApiError
from serving.grammars import json_grammar, regex_grammar
from serving.interpreter import engine_python
from serving.metrics import make_metrics
from serving.openai_schema import ChatRequest, CompletionRequest
from serving.service import ServedModel, Service

ENGINES = {"openvino": "toy_quantized", "torch": "toy_base", "vllm": "wide_base"}
BASES = {"openvino": "toy_base", "torch": "toy_base", "vllm": "wide_base"}
GUESSES = SpeculativeConfig(max_requests=16, min_acceptance=0.0)
MARKS = {"vllm": [pytest.mark.vllm], "vllm-guessing": [pytest.mark.vllm], "torch-guessing": [pytest.mark.slow]}
"""Guesses of `torch` are compared with its answers without them in test_serving_speculation.py."""
PARAMS = [
    pytest.param((name, guesses), id=kind, marks=MARKS.get(kind, []))
    for name in ENGINES
    for kind, guesses in ((name, None), (f"{name}-guessing", GUESSES))
]
WEIGHTS = {"openvino": "openvino_model.xml", "torch": "model.safetensors", "vllm": "model.safetensors"}
ENDLESS = Sampling(max_tokens=100_000)
CLAIM = Claim(key="", weight=1.0, priority=0, num_prompt=1)
PROMPT = (5, 6, 7, 8)
STOP_ID = 2
LAMP = {"type": "function", "function": {"name": "lamp", "parameters": {"type": "object", "properties": {"on": {"type": "boolean"}},
        "required": ["on"], "additionalProperties": False}}}  # fmt: skip


class Running:
    """An engine that runs on a loop kept for it."""

    def __init__(self, name: str, folder: Path, guesses: SpeculativeConfig | None = None) -> None:
        self.name, self.folder, self.guesses = name, folder, guesses
        self.codec: ChatCodec = load_codec(folder)
        self._loop = asyncio.new_event_loop()
        self.engine: Engine = make_engine(
            folder, ServeConfig(engine=name, max_running_requests=16, cpus_per_replica=2, speculative=guesses)
        )
        try:
            self._loop.run_until_complete(self.engine.start())
        except ArtifactError:
            self._loop.close()
            raise

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self._loop.run_until_complete(asyncio.wait_for(work, 60))

    def close(self) -> None:
        self.run(self.engine.stop())
        self._loop.close()

    async def collect(self, prompt: tuple[int, ...], sampling: Sampling) -> tuple[list[int], str | None, list[TokenLogprob]]:
        ids: list[int] = []
        told: list[TokenLogprob] = []
        reason = None
        async with aclosing(self.engine.generate(prompt, sampling)) as chunks:
            async for chunk in chunks:
                ids += chunk.ids
                told += chunk.logprobs
                reason = chunk.finish_reason
        return ids, reason, told

    def answer(self, max_tokens: int = 16, prompt: tuple[int, ...] = PROMPT, **sampling: Any) -> tuple[list[int], str | None]:
        """Ids and finish reason."""
        return self.run(self.collect(prompt, Sampling(max_tokens=max_tokens, **sampling)))[:2]

    def service(self) -> Service:
        model = ServedModel("toy", "fp", 256, len(self.codec.tokenizer.get_vocab()), (STOP_ID,), 1)
        gate = Gate(16, 0)
        return Service(model, self.engine, self.codec, ServeConfig(), make_metrics("toy", self.engine, gate, "replica"), gate)


@pytest.fixture(scope="module", params=PARAMS)
def running(request: pytest.FixtureRequest) -> Iterator[Running]:
    name, guesses = request.param
    try:
        engine_python(ServeConfig(engine=name))
    except ConfigError as error:
        pytest.skip(error.message)
    engine = Running(name, request.getfixturevalue(ENGINES[name]), guesses)
    yield engine
    engine.close()


def is_refused(running: Running, **sampling: Any) -> bool:
    """Whether the engine says that it cannot do this at all, as it then must when it is asked."""
    if running.engine.capabilities.refusal(Sampling(max_tokens=1, **sampling)) is None:
        return False
    with pytest.raises(RequestRefusedError):
        running.answer(1, **sampling)
    return True


def engine_processes(name: str, pid: int | None = None) -> list[psutil.Process]:
    """The engines' processes right below this process, or `pid`."""
    return [child for child in psutil.Process(pid).children() if f"serving.engines.{name}_steps" in child.cmdline()]


def test_greedy_answer_is_the_same_again_and_among_others(running: Running) -> None:
    """Among others over seven tokens: at the eighth, two logits of the toy are the same in bfloat16, and sums of other batches differ."""

    async def crowd() -> Any:
        others = [running.collect((9 + index, *PROMPT)[: 2 + index % 4], Sampling(max_tokens=4 + index)) for index in range(7)]
        return (await asyncio.gather(running.collect(PROMPT, Sampling(max_tokens=16)), *others))[0][:2]

    alone = running.answer()
    assert alone == running.answer()
    assert alone[0][:7] == running.run(crowd())[0][:7]
    assert (len(alone[0]), alone[1]) == (16, "length")


def test_stop_id_ends_the_answer_and_is_left_out(running: Running) -> None:
    free, _ = running.answer()
    assert running.answer(stop_ids=(free[5],)) == (free[: free.index(free[5])], "stop")


@pytest.mark.parametrize("max_tokens", [1, 2, 7])
def test_max_tokens_are_made_and_no_more(running: Running, max_tokens: int) -> None:
    ids, reason = running.answer(max_tokens)
    assert (len(ids), reason) == (max_tokens, "length")


def test_seed_repeats_a_sampled_answer_and_absence_does_not(running: Running) -> None:
    first, again, other, free, free_again = (running.answer(temperature=1.5, seed=seed)[0] for seed in (5, 5, -5, None, None))
    assert first == again
    assert len({tuple(ids) for ids in (first, other, free, free_again)}) == 4


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-6}])
def test_narrowest_sampling_gives_the_greedy_answer(running: Running, narrow: dict[str, Any]) -> None:
    """Over seven tokens: at the eighth, two logits of the toy model are the same in OpenVINO's bfloat16."""
    if is_refused(running, **{"temperature": 2.0, **narrow}):
        return
    assert running.answer(7, **{"temperature": 2.0, "seed": 3, **narrow}) == running.answer(7)
    assert running.answer(7, temperature=2.0, seed=3) != running.answer(7)


@pytest.mark.parametrize("filtered", [{"top_k": 2}, {"top_p": 0.3}, {"min_p": 0.5}])
def test_filter_keeps_sampled_tokens_among_the_likeliest(running: Running, filtered: dict[str, Any]) -> None:
    """Forty first tokens: without a filter they scatter; with one, a 32-bit pass of the toy model leaves 2, 10 and 3."""
    if is_refused(running, temperature=1.0, **filtered):
        return

    async def first_tokens(**sampling: Any) -> set[int]:
        jobs = [running.collect(PROMPT, Sampling(max_tokens=1, temperature=1.0, seed=seed, **sampling)) for seed in range(40)]
        return {ids[0] for ids, *_ in await asyncio.gather(*jobs)}

    assert len(running.run(first_tokens())) > 15
    assert len(running.run(first_tokens(**filtered))) <= {"top_k": 2, "top_p": 12, "min_p": 5}[next(iter(filtered))]


@pytest.mark.parametrize("penalty", [{"presence_penalty": 2.0}, {"frequency_penalty": 2.0}, {"repetition_penalty": 3.0}])
def test_penalty_leaves_fewer_repeats_and_is_repeatable(running: Running, penalty: dict[str, Any]) -> None:
    free, held = running.answer(64)[0], running.answer(64, **penalty)[0]
    assert len(set(held)) > len(set(free))
    assert held == running.answer(64, **penalty)[0]


def test_repetition_penalty_counts_the_prompt_too(running: Running) -> None:
    first = running.answer(1)[0][0]
    held = running.answer(1, prompt=(first, first, *PROMPT))[0]
    assert running.answer(1, prompt=(first, first, *PROMPT), repetition_penalty=1.0)[0] == held
    assert first not in running.answer(8, prompt=(first, first, *PROMPT), repetition_penalty=10.0)[0]


SAMPLED = {"temperature": 2.0, "seed": 3}


@pytest.mark.parametrize("sampling", [{}, SAMPLED, {**SAMPLED, "top_k": 1}, {**SAMPLED, "min_p": 0.5}, {"repetition_penalty": 5.0}])
def test_logprobs_are_those_of_the_forward_pass(running: Running, sampling: dict[str, Any], request: pytest.FixtureRequest) -> None:
    """However tokens are chosen, within 0.15 of a 32-bit pass, of unlikely ones 0.4: the weights of the toys are 16-bit, OpenVINO's 8-bit.

    Measured 0.06 and 0.2 at most; the temperature of 2 would move most by 0.5 to 1.3, a filter by more. A greedy token is the likeliest of
    that pass, or one that such an error could put in its place.
    """
    import torch
    from transformers import AutoModelForCausalLM

    if is_refused(running, **sampling):
        return
    ids, _, told = running.run(running.collect(PROMPT, Sampling(max_tokens=12, logprobs=0, **sampling)))
    model = AutoModelForCausalLM.from_pretrained(request.getfixturevalue(BASES[running.name]), dtype=torch.float32)
    with torch.no_grad():
        expected = model(torch.tensor([[*PROMPT, *ids]])).logits[0].log_softmax(-1)
    assert len(told) == len(ids) == 12
    for place, (token, one) in enumerate(zip(ids, told, strict=True)):
        of_all = expected[len(PROMPT) - 1 + place]
        assert one.logprob == pytest.approx(float(of_all[token]), abs=0.4 if sampling else 0.15)
        assert one.top == ()
        if not sampling:
            assert float(of_all.max() - of_all[token]) < 0.15


def test_top_logprobs_are_ordered_and_sum_to_at_most_one_or_are_refused(running: Running) -> None:
    capabilities = running.engine.capabilities
    request = CompletionRequest(model="toy", prompt=list(PROMPT), max_tokens=4, logprobs=5)
    if capabilities.max_top_logprobs < 5:
        with pytest.raises(ApiError, match=f"logprobs.*{running.name}") as raised:
            running.run(running.service().completion_order(request))
        assert (raised.value.status, raised.value.param) == (400, "logprobs")
        return
    ids, _, told = running.run(running.collect(PROMPT, Sampling(max_tokens=4, logprobs=5)))
    for token, one in zip(ids, told, strict=True):
        values = [value for _, value in one.top]
        assert values == sorted(values, reverse=True)
        assert len(values) == 5
        assert sum(map(math.exp, values)) <= 1 + 1e-5
        assert one.top[0] == (token, one.logprob)
    if capabilities.grammars:
        _, _, told = running.run(running.collect(PROMPT, Sampling(max_tokens=1, logprobs=5, grammar=regex_grammar("[ab]"))))
        assert sorted(running.codec.decode([token]) for token, _ in told[0].top) == ["a", "b"]


def grammar_is_kept(running: Running, grammar: Grammar, check: Callable[[str], object], **sampling: Any) -> None:
    if grammar.kind not in running.engine.capabilities.grammars:
        refusal = running.engine.capabilities.refusal(Sampling(max_tokens=1, grammar=grammar))
        assert refusal is not None
        assert running.name in refusal[1]
        return
    for _ in range(3):  # JSON allows blanks without end, and with guesses a seed does not fix what vLLM draws
        ids, reason = running.answer(200, grammar=grammar, stop_ids=(STOP_ID,), **sampling)
        if reason == "stop":
            break
    assert reason == "stop"
    assert check(running.codec.decode(ids))


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.5, "seed": 4}])
def test_regex_is_kept_or_refused(running: Running, sampling: dict[str, Any]) -> None:
    grammar_is_kept(running, regex_grammar("(on|off) \\d{2,4}"), re.compile("(on|off) [0-9]{2,4}").fullmatch, **sampling)


# sampled both times: by a greedy choice the toy's random weights may write blanks, which JSON allows, for ever
@pytest.mark.parametrize("sampling", [{"temperature": 1.5, "seed": 3}, {"temperature": 1.5, "seed": 4}])
def test_json_schema_is_kept_or_refused(running: Running, sampling: dict[str, Any]) -> None:
    properties = {"colour": {"enum": ["red", "grün"]}, "on": {"type": "boolean"}}
    schema = {"type": "object", "properties": properties, "required": ["colour", "on"], "additionalProperties": False}

    def check(text: str) -> bool:
        value = json.loads(text)
        return set(value) == {"colour", "on"} and value["colour"] in ("red", "grün") and isinstance(value["on"], bool)

    grammar_is_kept(running, json_grammar(schema), check, **sampling)


def test_forced_tool_call_comes_back_as_a_call_or_is_refused(running: Running) -> None:
    service = running.service()
    message = {"role": "user", "content": "turn the lamp on"}
    request = ChatRequest.model_validate(
        {
            "model": "toy",
            "messages": [message],
            "tools": [LAMP],
            "tool_choice": "required",
            "max_tokens": 200,
            "temperature": 1.5,
            "seed": 4,
        }
    )
    if not running.engine.capabilities.grammars:
        with pytest.raises(ApiError, match=f"tool_choice.*{running.name}") as raised:
            running.run(service.chat_order(request))
        assert (raised.value.status, raised.value.param) == (400, "tool_choice")
        return

    async def pieces() -> list[Any]:
        return [piece async for piece in service.answer(await service.chat_order(request), CLAIM)]

    made = running.run(pieces())
    (call,) = [call for piece in made for call in piece.calls]
    assert call.name == "lamp"
    assert set(json.loads(call.arguments)) == {"on"}
    assert (made[-1].finish_reason, "".join(piece.text for piece in made).strip()) == ("tool_calls", "")


def test_several_choices_differ_when_sampled_and_count_together(running: Running) -> None:
    service = running.service()
    order = Order(PROMPT, Sampling(max_tokens=8, temperature=1.5, seed=1), num_choices=3)

    async def texts() -> tuple[dict[int, str], int]:
        made = dict.fromkeys(range(3), "")
        num_tokens = 0
        async for piece in service.answer(order, CLAIM):
            made[piece.index] += piece.text
            num_tokens += piece.num_tokens
        return made, num_tokens

    first, num_tokens = running.run(texts())
    assert len(set(first.values())) == 3
    assert num_tokens == 24  # whether they repeat depends on who shares their steps: sums of other batches round otherwise


def test_stop_string_across_tokens_and_characters_cuts_the_text_and_the_work(running: Running) -> None:
    """Sampled bytes of the toy model make characters that several tokens share; the pieces joined are the whole text, cut at the stop."""
    service = running.service()

    async def text(stop: tuple[str, ...]) -> tuple[str, str | None]:
        order = Order(PROMPT, Sampling(max_tokens=60, temperature=1.0, seed=8), stop)
        pieces = [piece async for piece in service.answer(order, CLAIM)]
        return "".join(piece.text for piece in pieces), pieces[-1].finish_reason

    whole, reason = running.run(text(()))
    ids, _ = running.answer(60, temperature=1.0, seed=8)
    assert reason == "length"
    assert running.codec.decode(ids).startswith(whole)  # an incomplete last character is held back
    stop = whole[len(whole) // 2 : len(whole) // 2 + 3]
    assert running.run(text((stop,))) == (whole[: whole.index(stop)], "stop")


def test_cancelled_request_frees_its_place(running: Running) -> None:
    async def run() -> None:
        generator = running.engine.generate(PROMPT, ENDLESS)
        await anext(generator)
        assert running.engine.figures.num_running == 1
        await generator.aclose()
        while running.engine.figures.num_running:
            await asyncio.sleep(0.01)

    running.run(run())
    assert running.answer(3)[1] == "length"


def test_more_requests_than_places_are_all_answered(running: Running) -> None:
    async def run() -> list[int]:
        made = await asyncio.gather(*(running.collect((5 + index, 6), Sampling(max_tokens=4 + index % 5)) for index in range(40)))
        return [len(ids) for ids, *_ in made]

    assert running.run(run()) == [4 + index % 5 for index in range(40)]


def test_refused_request_leaves_the_others_running(running: Running) -> None:
    async def run() -> Any:
        good = asyncio.create_task(running.collect(PROMPT, Sampling(max_tokens=32)))
        with pytest.raises(RequestRefusedError, match="prompt"):
            await running.collect((), Sampling(max_tokens=4))
        return await good

    assert running.run(run())[1] == "length"


def test_guesses_are_counted_where_there_are_any(running: Running) -> None:
    """The toy soon repeats itself, so that some are right."""
    before = running.engine.figures
    assert running.answer(100)[1] == "length"
    after = running.engine.figures
    if running.guesses is None:
        assert (after.num_drafts, after.drafted_tokens, after.accepted_tokens) == (None, None, None)
        return
    assert None not in (after.num_drafts, after.drafted_tokens, after.accepted_tokens)
    assert after.num_drafts <= after.drafted_tokens <= running.guesses.num_tokens * after.num_drafts
    assert 0 < after.accepted_tokens < after.drafted_tokens
    assert after.num_drafts >= before.num_drafts


def test_stopped_engine_ends_its_requests_and_later_ones_with_an_error(running: Running) -> None:
    other = Running(running.name, running.folder, running.guesses)

    async def run() -> None:
        waiting = asyncio.create_task(other.collect(PROMPT, ENDLESS))
        await asyncio.sleep(0.1)
        await other.engine.stop()
        for request in (waiting, other.collect(PROMPT, Sampling(max_tokens=1))):
            with pytest.raises(EngineError, match="stopped"):
                await request

    other.run(run())
    other.close()


def test_killed_process_fails_its_requests_and_later_ones(running: Running) -> None:
    before = engine_processes(running.name)
    other = Running(running.name, running.folder, running.guesses)
    (process,) = set(engine_processes(running.name)) - set(before)
    below = process.children(recursive=True)

    async def run() -> None:
        generator = other.engine.generate(PROMPT, ENDLESS)
        await anext(generator)
        process.kill()
        with pytest.raises(EngineError, match="process ended"):
            [chunk async for chunk in generator]
        assert other.engine.failure is not None
        with pytest.raises(EngineError, match="process ended"):
            await other.collect(PROMPT, Sampling(max_tokens=1))

    other.run(run())
    other.close()
    assert psutil.wait_procs(below, timeout=10)[1] == []


def test_unreadable_model_is_refused(running: Running, tmp_path: Path) -> None:
    if running.guesses is not None:
        pytest.skip("the model is read in the same way, with guesses or without")
    before = engine_processes(running.name)
    folder = tmp_path / "model"
    shutil.copytree(running.folder, folder)
    (folder / WEIGHTS[running.name]).write_text("<net/>")
    with pytest.raises(ArtifactError, match=f"{running.name} cannot load it: "):
        Running(running.name, folder, running.guesses)
    assert engine_processes(running.name) == before


PARENT = """
import asyncio, sys
from pathlib import Path
from serving.config import ServeConfig, SpeculativeConfig
from serving.engines.base import Sampling
from serving.engines.registry import make_engine

async def run():
    engine = make_engine(Path(sys.argv[1]), ServeConfig(engine=sys.argv[2]))
    await engine.start()
    while True:
        async for _ in engine.generate((5, 6, 7), Sampling(max_tokens=100)):
            print("answering", flush=True)

asyncio.run(run())
"""


def test_process_ends_with_a_parent_that_is_killed_and_says_nothing(running: Running) -> None:
    if running.guesses is not None:
        pytest.skip("the process is the same, with guesses or without")
    command = [sys.executable, "-c", PARENT, str(running.folder), running.name]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert parent.stderr is not None
        assert parent.stdout.readline() == "answering\n"
        (child,) = engine_processes(running.name, parent.pid)
        family = [child, *child.children(recursive=True)]
        parent.kill()
        assert psutil.wait_procs(family, timeout=20)[1] == []
        assert set(parent.stdout) <= {"answering\n"}
        assert parent.stderr.read() == ""
