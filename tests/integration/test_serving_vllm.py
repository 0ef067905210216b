"""What is vLLM's own, beside what every engine must do: a cache smaller than the context, and a server whose engine has another Python."""

from __future__ import annotations

import asyncio
import itertools
import shutil
import sys
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from infra.errors import ArtifactError
from serving.config import ServeConfig
from serving.engines.base import RequestRefusedError, Sampling
from serving.engines.process import ProcessEngine
from serving.engines.registry import make_engine
from serving.engines.vllm import CAPABILITIES, VARIABLES
from serving.interpreter import engine_python

pytestmark = pytest.mark.vllm
CACHE_BYTES = 2 * 128 * 512  # blocks of 128 tokens, of which vLLM keeps one for itself; the wide toy's tokens take 512 bytes each
CACHE_TOKENS = 128


def test_request_larger_than_the_cache_is_refused_and_the_others_are_answered(wide_base: Path) -> None:
    settings = {"model_dir": str(wide_base), "max_running_requests": 4, "cache_bytes": CACHE_BYTES}
    python = engine_python(ServeConfig(engine="vllm"))

    async def collect(engine: ProcessEngine, num_prompt: int, max_tokens: int) -> int:
        num_made = 0
        async with aclosing(engine.generate([5] * num_prompt, Sampling(max_tokens=max_tokens))) as chunks:
            async for chunk in chunks:
                num_made += len(chunk.ids)
        return num_made

    async def run() -> list[Any]:
        engine = ProcessEngine(wide_base, "serving.engines.vllm_steps", settings, CAPABILITIES, python, VARIABLES)
        await engine.start()
        try:
            sizes = [(CACHE_TOKENS, 1), (100, CACHE_TOKENS), (100, 20), (100, 28)]
            return await asyncio.gather(*(collect(engine, *size) for size in sizes), return_exceptions=True)
        finally:
            await engine.stop()

    *refused, short, exact = asyncio.run(run())
    assert [type(error) for error in refused] == [RequestRefusedError] * 2
    assert all("raise serve.cache_gb" in str(error) for error in refused)
    assert (short, exact) == (20, 28)


def test_model_that_vllm_cannot_compute_is_refused_before_it_is_asked(toy_base: Path) -> None:
    """Heads of 16 numbers load on a CPU, and the first token is what cannot be computed."""
    engine = make_engine(toy_base, ServeConfig(engine="vllm"))
    with pytest.raises(ArtifactError, match=r"vllm cannot load it: .*head_dim=16"):
        asyncio.run(engine.start())


def test_prefix_cache_counts_each_prompt_once_and_what_it_held_of_it(wide_base: Path) -> None:
    """vLLM holds whole blocks, of 128 tokens; of a prompt that it holds to its end it computes the last token's anew."""
    settings = {"model_dir": str(wide_base), "max_running_requests": 4, "cache_bytes": 20 * CACHE_BYTES}
    first, other = [token % 200 + 5 for token in range(200)], [9] * 150

    async def run() -> list[tuple[int, int]]:
        engine = ProcessEngine(
            wide_base, "serving.engines.vllm_steps", settings, CAPABILITIES, engine_python(ServeConfig(engine="vllm")), VARIABLES
        )
        await engine.start()
        counts = []
        try:
            for prompt in (other[:1], first, first, first[:140] + [3] * 20, other):
                async with aclosing(engine.generate(prompt, Sampling(max_tokens=4))) as chunks:
                    async for _ in chunks:
                        pass
                figures = engine.figures
                counts.append((figures.prefix_asked_tokens or 0, figures.prefix_held_tokens or 0))
        finally:
            await engine.stop()
        return counts

    counts = asyncio.run(run())
    gained = [(after[0] - before[0], after[1] - before[1]) for before, after in itertools.pairwise(counts)]
    assert gained == [(200, 0), (200, 128), (160, 128), (150, 0)]


def test_prefix_cache_is_not_shared_between_adapters(wide_base: Path, adapters_of: Callable[..., Any]) -> None:
    """Of the same prompt each adapter, and the model alone, finds nothing that another has left."""
    adapters = {name: each.folder for name, each in adapters_of(wide_base).items()}
    engine = make_engine(wide_base, ServeConfig(engine="vllm", max_running_requests=4, cache_gb=0.02, adapters=adapters))
    prompt = [token % 200 + 5 for token in range(200)]

    async def run() -> list[int]:
        await engine.start()
        held = [engine.figures.prefix_held_tokens or 0]
        try:
            for adapter in ("red", "blue", None, "red", "blue", None):
                async with aclosing(engine.generate(prompt, Sampling(max_tokens=4, adapter=adapter))) as chunks:
                    async for _ in chunks:
                        pass
                held.append(engine.figures.prefix_held_tokens or 0)
        finally:
            await engine.stop()
        return held

    gained = [after - before for before, after in itertools.pairwise(asyncio.run(run()))]
    assert gained == [0, 0, 0, 128, 128, 128]


def test_adapter_whose_files_are_gone_fails_its_own_requests_alone(
    wide_base: Path, adapters_of: Callable[..., Any], tmp_path: Path
) -> None:
    kept = adapters_of(wide_base)["red"].folder
    shutil.copytree(kept, tmp_path / "lost")
    adapters = {"red": kept, "lost": tmp_path / "lost"}
    engine = make_engine(wide_base, ServeConfig(engine="vllm", max_running_requests=4, cache_gb=0.02, adapters=adapters))

    async def collect(adapter: str) -> int:
        num_made = 0
        async with aclosing(engine.generate([5] * 20, Sampling(max_tokens=4, adapter=adapter))) as chunks:
            async for chunk in chunks:
                num_made += len(chunk.ids)
        return num_made

    async def run() -> list[Any]:
        await engine.start()
        shutil.rmtree(tmp_path / "lost")
        try:
            return await asyncio.gather(collect("red"), collect("lost"), collect("red"), return_exceptions=True)
        finally:
            await engine.stop()

    first, refused, last = asyncio.run(run())
    assert isinstance(refused, RequestRefusedError)
    assert "the adapter 'lost' cannot be loaded" in str(refused)
    assert (first, last) == (4, 4)


def test_server_with_vllm_answers_and_leaves_no_process(wide_base: Path, start_toy_server: Callable[..., Any]) -> None:
    server = start_toy_server(model_dir=wide_base, engine="vllm")
    try:
        server.wait_ready()
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            answer = client.completions.create(
                model="toy", prompt="turn the lamp", max_tokens=8, logprobs=2, extra_body={"ignore_eos": True}
            )
        family = server.family()
        (engine,) = [process for process in family if "serving.engines.vllm_steps" in process.cmdline()]
        assert Path(engine.cmdline()[0]) == engine_python(ServeConfig(engine="vllm")) != Path(sys.executable)
    finally:
        assert server.stop() == 0
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 8
    assert answer.choices[0].logprobs is not None
    tops = answer.choices[0].logprobs.top_logprobs or []
    assert len(tops) == 8
    assert any(len(top) >= 2 for top in tops)  # by text: half a character looks like another half
    assert psutil.wait_procs(family, timeout=10)[1] == []
