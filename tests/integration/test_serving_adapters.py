"""Two trained adapters beside one model: each answers as its merged model does, whatever else runs and whatever was held before."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families
from safetensors.torch import load_file, save_file

from infra.chat import load_codec
from infra.contracts import read_manifest, write_manifest
from infra.errors import ArtifactError, ConfigError
from infra.provenance import Provenance
from serving.adapter_files import ADAPTER_FILE_NAME
from serving.config import ServeConfig
from serving.engines.base import Engine, RequestRefusedError, Sampling
from serving.engines.registry import make_engine
from serving.interpreter import engine_python

ENGINES = {"openvino": ("toy_quantized", "toy_base"), "torch": ("toy_base", "toy_base"), "vllm": ("wide_base", "wide_base")}
PARAMS = [pytest.param(name, marks=[pytest.mark.vllm] if name == "vllm" else []) for name in ENGINES]
NAMES = ("red", "blue", None)
MESSAGES: Any = [{"role": "system", "content": "answer with a colour"}, {"role": "user", "content": "turn the lamp on please please 3"}]
MAX_TOKENS = 24
STOP_ID = 2
SURE_TOKENS = 7
"""Of the untrained model's answer, which other sums of another batch do not change."""


def greedy(adapter: Any) -> str:
    """What transformers makes of its merged model, the reference, as far as it was taught."""
    import torch
    from transformers import AutoModelForCausalLM

    codec = load_codec(adapter.merged)
    ids = codec.encode(MESSAGES, None, True)
    model = AutoModelForCausalLM.from_pretrained(adapter.merged, dtype=torch.float32)
    made = model.generate(torch.tensor([ids]), max_new_tokens=MAX_TOKENS, do_sample=False, eos_token_id=STOP_ID, pad_token_id=STOP_ID)
    text: str = codec.decode(made[0, len(ids) :].tolist())
    assert text.startswith(adapter.taught)
    return adapter.taught


def samples(url: str, name: str) -> list[tuple[dict[str, str], float]]:
    """Labels and values of one metric."""
    families = text_string_to_metric_families(httpx.get(f"{url}/metrics").text)
    return [(sample.labels, sample.value) for family in families for sample in family.samples if sample.name == name]


def wait_until(is_true: Callable[[], bool], timeout_s: float) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < deadline_s, "not in time"
        time.sleep(0.1)


async def answer(engine: Engine, prompt: list[int], adapter: str | None) -> list[int]:
    ids: list[int] = []
    sampling = Sampling(max_tokens=MAX_TOKENS, stop_ids=(STOP_ID,), adapter=adapter)
    async with aclosing(engine.generate(prompt, sampling)) as chunks:
        async for chunk in chunks:
            ids += chunk.ids
    return ids


@pytest.mark.parametrize("max_adapters", [1, 2])
@pytest.mark.parametrize("name", PARAMS)
def test_engine_answers_of_adapters_that_run_together_are_those_of_each_merged_model(
    name: str, max_adapters: int, adapters_of: Callable[..., Any], request: pytest.FixtureRequest
) -> None:
    try:
        engine_python(ServeConfig(engine=name))
    except ConfigError as error:
        pytest.skip(error.message)
    folder, base = (request.getfixturevalue(fixture) for fixture in ENGINES[name])
    adapters = adapters_of(base)
    codec = load_codec(folder)
    prompt = codec.encode(MESSAGES, None, True)
    config = ServeConfig(
        engine=name, max_running_requests=16, cpus_per_replica=2, adapters={key: each.folder for key, each in adapters.items()},
        max_adapters=max_adapters,
    )  # fmt: skip
    orders = [NAMES[index % 3] for index in range(12)]

    async def run() -> tuple[list[list[int]], list[list[int]], list[int], tuple[str, ...]]:
        engine = make_engine(folder, config)
        await engine.start()
        try:
            alone = [await answer(engine, prompt, None)]
            crowd = await asyncio.gather(*(answer(engine, prompt, adapter) for adapter in orders))
            left = asyncio.create_task(answer(engine, prompt, "red"))
            await asyncio.sleep(0)
            left.cancel()
            again = [await answer(engine, prompt, adapter) for adapter in ("blue", "red", None)]
            return crowd, again, alone[0], engine.figures.adapters
        finally:
            await engine.stop()

    crowd, again, alone, held = asyncio.run(run())

    def shown(adapter: str | None, ids: list[int]) -> Any:
        return codec.decode(ids)[: len(adapters[adapter].taught)] if adapter else ids[:SURE_TOKENS]

    expected = {name: greedy(each) for name, each in adapters.items()} | {None: shown(None, alone)}
    assert [shown(*each) for each in zip(orders, crowd, strict=True)] == [expected[adapter] for adapter in orders]
    assert [shown(*each) for each in zip(("blue", "red", None), again, strict=True)] == [expected[name] for name in ("blue", "red", None)]
    assert held == ("blue", "red")[-max_adapters:]


@pytest.mark.parametrize("name", ["openvino", "torch"])
def test_adapter_that_changes_a_layer_which_the_model_lacks_is_refused(
    name: str, adapters_of: Callable[..., Any], toy_base: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """OpenVINO's library would answer without it."""
    good = adapters_of(toy_base)["red"].folder
    tensors = {tensor.replace("layers.1.", "layers.7."): value for tensor, value in load_file(good / ADAPTER_FILE_NAME).items()}
    save_file(tensors, tmp_path / ADAPTER_FILE_NAME)
    write_manifest(tmp_path, "adapter", Provenance(), model=read_manifest(good).model)
    folder = request.getfixturevalue(ENGINES[name][0])
    engine = make_engine(folder, ServeConfig(engine=name, cpus_per_replica=2, adapters={"red": tmp_path}))

    async def run() -> None:
        await engine.start()
        try:
            await answer(engine, [5, 6, 7], "red")
        finally:
            await engine.stop()

    with pytest.raises((ArtifactError, RequestRefusedError), match=r"changes \['model.layers.7"):
        asyncio.run(run())


@pytest.fixture(scope="module")
def server(start_toy_server: Callable[..., Any], adapters_of: Callable[..., Any], toy_base: Path) -> Iterator[Any]:
    """With room for one adapter, so that each change of adapter drops the other."""
    folders = {name: str(each.folder) for name, each in adapters_of(toy_base).items()}
    running = start_toy_server(adapters=folders, max_adapters=1)
    try:
        running.wait_ready()
        yield running
    finally:
        running.stop()


@pytest.fixture
def client(server: Any) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_client_lists_adapters_with_their_parent(client: openai.OpenAI) -> None:
    listed = {model.id: model.model_dump()["parent"] for model in client.models.list()}
    assert listed == {"toy": None, "red": "toy", "blue": "toy"}
    assert client.models.retrieve("toy:blue").id == client.models.retrieve("blue").id == "blue"
    with pytest.raises(openai.NotFoundError) as raised:
        client.chat.completions.create(model="toy:green", messages=MESSAGES)
    assert raised.value.code == "model_not_found"


def test_client_asks_for_adapters_by_both_names_at_once_and_each_answers_as_its_merged_model(
    server: Any, adapters_of: Callable[..., Any], toy_base: Path
) -> None:
    expected = {name: greedy(each) for name, each in adapters_of(toy_base).items()}
    names = ["red", "toy:red", "blue", "toy:blue", "toy"] * 5

    async def one(client: openai.AsyncOpenAI, name: str, stream: bool) -> tuple[str, str]:
        body: Any = {"model": name, "messages": MESSAGES, "max_tokens": MAX_TOKENS, "temperature": 0}
        if not stream:
            whole = await client.chat.completions.create(**body)
            return whole.model, whole.choices[0].message.content or ""
        chunks = [chunk async for chunk in await client.chat.completions.create(**body, stream=True)]
        return chunks[0].model, "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    async def run() -> list[tuple[str, str]]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            return list(await asyncio.gather(*(one(client, name, index % 2 == 0) for index, name in enumerate(names))))

    answers = asyncio.run(run())
    for name, (model, text) in zip(names, answers, strict=True):
        assert model == name.removeprefix("toy:")
        assert [name for name, taught in expected.items() if text.startswith(taught)] == ([model] if model in expected else [])


def test_server_tells_of_adapters_in_figures_and_request_log(server: Any, client: openai.OpenAI) -> None:
    def figures() -> dict[str, float]:
        names = ("slipway_adapter_requests_total", "slipway_adapter_generation_tokens_total")
        return {name: sum(value for labels, value in samples(server.url, name) if labels["adapter"] == "blue") for name in names}

    client.completions.create(model="blue", prompt="lamp", max_tokens=5, extra_body={"ignore_eos": True})
    before = figures()
    client.completions.create(model="toy:blue", prompt="lamp", max_tokens=7, extra_body={"ignore_eos": True})
    gained = {name: value - before[name] for name, value in figures().items()}
    assert gained == {"slipway_adapter_requests_total": 1, "slipway_adapter_generation_tokens_total": 7}
    ((labels, told_s),) = samples(server.url, "vllm:lora_requests_info")
    assert (labels["max_lora"], labels["running_lora_adapters"]) == ("1", "")
    assert abs(told_s - time.time()) < 60
    (log,) = server.output_dir.glob("requests-*.jsonl")
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["model"] for line in lines if line.get("path") == "/v1/completions"][-2:] == ["blue", "blue"]


@pytest.mark.slow
def test_server_two_replicas_hold_an_adapter_each_and_get_the_requests_for_it(
    start_toy_server: Callable[..., Any], adapters_of: Callable[..., Any], toy_base: Path
) -> None:
    folders = {name: str(each.folder) for name, each in adapters_of(toy_base).items()}
    server = start_toy_server(adapters=folders, max_adapters=1, num_replicas=2)
    try:
        server.wait_ready()
        wait_until(lambda: len(samples(server.url, "slipway_engine_up")) == 2, 90)
        for number in range(6):
            for name in ("red", "blue"):
                body = {"model": name, "prompt": f"{number} {name}", "max_tokens": 4}
                assert httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).status_code == 200
                time.sleep(0 if number else 1)  # the front is told of an adapter within a fifth of that
        counted = samples(server.url, "slipway_adapter_requests_total")
    finally:
        server.stop()
    assert sorted((labels["adapter"], value) for labels, value in counted) == [("blue", 6), ("red", 6)]
    assert len({labels["replica"] for labels, _ in counted}) == 2


def test_server_with_an_adapter_of_another_base_ends_before_ray_starts_and_names_all_that_is_wrong(
    start_toy_server: Callable[..., Any], adapters_of: Callable[..., Any], toy_base: Path, tmp_path: Path
) -> None:
    adapters = adapters_of(toy_base)
    server = start_toy_server(
        model_dir=adapters["red"].merged, engine="torch",
        adapters={"blue": str(adapters["blue"].folder), "gone": str(tmp_path / "gone")},
    )  # fmt: skip
    _, stderr = server.process.communicate(timeout=60)
    assert server.process.returncode == 2
    assert "with an adapter merged into it already" in stderr
    assert "gone: no manifest.json" in stderr
