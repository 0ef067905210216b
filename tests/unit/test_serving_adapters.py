"""Adapters beside one model: what is refused, which one a request means, and which are held in memory."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import ValidationError

from infra.contracts import AdapterFacts, Kind, Manifest, ModelFacts, write_manifest
from infra.errors import ConfigError
from infra.provenance import Provenance
from serving.adapter_files import read_adapters
from serving.adapters import adapter_named, adapter_settings, require_adapters
from serving.admission import Gate
from serving.config import ServeConfig, ServeJob
from serving.engines.adapter_batch import AdapterBatch
from serving.engines.base import Sampling
from serving.engines.messages import News
from serving.engines.scripted import ScriptedEngine
from serving.metrics import make_metrics
from serving.openai_api import build_api
from serving.service import Service
from tests.unit.test_serving_api import CHAT, COMPLETION, USER, byte_codec, make_service, request, scripted

FACTS = AdapterFacts(rank=8, alpha=16, target_modules=("q_proj",))


def artifact(
    folder: Path, kind: Kind, base_digest: str = "weights", adapter: AdapterFacts | None = None, parents: dict[str, str] | None = None
) -> Manifest:
    """A folder of a kind, with one file."""
    folder.mkdir()
    (folder / "file.txt").write_text(folder.name)
    facts = ModelFacts(
        base_model="b", base_digest=base_digest, tokenizer_digest="t", chat_template_digest="c", special_tokens={}, context_tokens=64,
        stop_ids=(2,), adapter=adapter,
    )  # fmt: skip
    return write_manifest(folder, kind, Provenance(), model=facts, parents=parents)


@pytest.mark.parametrize(
    ("name", "adapter"), [("red", "red"), ("toy:red", "red"), ("toy", None), ("toy:", None), ("toy:toy:red", None), ("other:red", None)]
)
def test_name_of_an_adapter_is_bare_or_behind_its_model(name: str, adapter: str | None) -> None:
    assert adapter_named(name, "toy", {"red": 1, "blue": 2}) == adapter


@pytest.mark.parametrize("name", ["", "a:b", "a/b", " red", "-red", "x" * 65])
def test_config_adapter_with_such_a_name_is_refused(name: str) -> None:
    with pytest.raises(ValidationError, match="adapters"):
        ServeConfig(adapters={name: Path("a")})


def test_config_adapter_named_as_the_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="both named 'toy'"):
        ServeJob(output_dir=tmp_path, model_dir=tmp_path, model_name="toy", serve=ServeConfig(adapters={"toy": Path("a")}))


def test_adapter_of_the_served_base_passes_quantized_or_not(tmp_path: Path) -> None:
    base = artifact(tmp_path / "base", "base")
    artifact(tmp_path / "red", "adapter", base.digest, FACTS)
    quantized = artifact(tmp_path / "quantized", "quantized", parents={"merged": base.digest})
    for engine, folder, manifest in (("torch", "base", base), ("vllm", "base", base), ("openvino", "quantized", quantized)):
        require_adapters(ServeConfig(engine=engine, adapters={"red": tmp_path / "red"}), tmp_path / folder, manifest)


def test_adapters_that_cannot_be_served_are_all_named_at_once(tmp_path: Path) -> None:
    base = artifact(tmp_path / "base", "base")
    merged = artifact(tmp_path / "merged", "merged", base.digest)
    served = artifact(tmp_path / "served", "quantized", base.digest, parents={"merged": merged.digest})
    artifact(tmp_path / "red", "adapter", base.digest, FACTS)
    artifact(tmp_path / "stranger", "adapter", "another", FACTS.model_copy(update={"use_dora": True}))
    artifact(tmp_path / "damaged", "adapter", base.digest, FACTS)
    (tmp_path / "damaged/file.txt").write_text("changed")
    names = ("red", "stranger", "damaged", "absent", "base")
    with pytest.raises(ConfigError) as raised:
        require_adapters(ServeConfig(adapters={name: tmp_path / name for name in names}), tmp_path / "served", served)
    lines = raised.value.message.splitlines()[1:]
    problems = {name: [line for line in lines if line.startswith(f"  - {name} (")] for name in names}
    assert {name: len(found) for name, found in problems.items()} == {"red": 1, "stranger": 2, "damaged": 1, "absent": 1, "base": 1}
    assert "with an adapter merged into it already" in problems["red"][0]
    assert "DoRA" in problems["stranger"][0]
    assert f"is made of {merged.digest}" in problems["stranger"][1]
    assert "sha256" in problems["damaged"][0]
    assert "'base' artifact" in problems["base"][0]


def test_engine_is_told_folder_rank_and_scale(tmp_path: Path) -> None:
    artifact(tmp_path / "red", "adapter", adapter=FACTS.model_copy(update={"use_rslora": True, "rank": 4}))
    told = adapter_settings(ServeConfig(adapters={"red": tmp_path / "red"}, max_adapters=7))
    assert told["max_adapters"] == 1
    red = read_adapters(told["adapters"])["red"]
    assert (red.rank, red.scale, red.weights) == (4, 8.0, tmp_path / "red/adapter_model.safetensors")
    assert adapter_settings(ServeConfig()) == {}


class Counted:
    """A batch whose requests end after `max_tokens` steps."""

    adapters = ()

    def __init__(self) -> None:
        self.left: dict[int, int] = {}

    @property
    def has_work(self) -> bool:
        return bool(self.left)

    @property
    def figures(self) -> tuple[int, int, float]:
        return len(self.left), 0, 0.5

    def add(self, number: int, _prompt_ids: list[int], sampling: Sampling) -> News | None:
        self.left[number] = sampling.max_tokens
        return None

    def cancel(self, number: int) -> None:
        del self.left[number]

    def step(self) -> list[News]:
        self.left = {number: count - 1 for number, count in self.left.items()}
        news: list[News] = [(number, [7], None, None if count else "length", None) for number, count in self.left.items()]
        self.left = {number: count for number, count in self.left.items() if count}
        return news

    def clear(self) -> None:
        self.left.clear()


class Shelf:
    """An AdapterBatch over counted batches, and what it loaded, in order."""

    def __init__(self, max_held: int, load: Callable[[str], None] = lambda name: None) -> None:
        self.loaded: list[str] = []
        self.batch = AdapterBatch(Counted(), self._load, max_held)
        self._check = load
        self._numbers = iter(range(1000))

    def _load(self, name: str) -> Counted:
        self._check(name)
        self.loaded.append(name)
        return Counted()

    def ask(self, adapter: str | None, max_tokens: int = 1) -> int:
        number = next(self._numbers)
        assert self.batch.add(number, [1], Sampling(max_tokens=max_tokens, adapter=adapter)) is None
        return number

    def run(self, max_steps: int = 10_000) -> list[int]:
        """Numbers of those that ended, in order."""
        ended = []
        while self.batch.has_work and max_steps:
            ended += [number for number, *_, reason, refusal in self.batch.step() if reason or refusal]
            max_steps -= 1
        return ended


def test_shelf_drops_the_adapter_unused_longest() -> None:
    shelf = Shelf(2)
    for name in ("red", "blue", "red", "green"):
        shelf.ask(name)
        shelf.run()
    assert shelf.loaded == ["red", "blue", "green"]
    assert list(shelf.batch.adapters) == ["red", "green"]


def test_shelf_never_drops_an_adapter_that_runs_and_requests_for_others_go_on() -> None:
    shelf = Shelf(1)
    long, model = shelf.ask("red", 50), shelf.ask(None, 3)
    assert shelf.run(max_steps=40) == [model]
    other = shelf.ask("blue")
    assert shelf.batch.figures == (1, 1, 0.5)
    assert shelf.run() == [long, other]
    assert list(shelf.batch.adapters) == ["blue"]


def test_shelf_adapter_always_asked_for_keeps_no_other_out_and_all_that_wait_for_one_begin_together() -> None:
    shelf = Shelf(1)
    first = shelf.ask("red", 5)
    shelf.run(max_steps=3)
    waiting = [shelf.ask(name) for name in ("blue", "red", "blue", "red")]
    ended = shelf.run()
    assert ended == [first, waiting[0], waiting[2], waiting[1], waiting[3]]
    assert shelf.loaded == ["red", "blue", "red"]


def test_shelf_loads_while_the_model_and_held_adapters_go_on_answering() -> None:
    may_load = threading.Event()

    def wait(name: str) -> None:
        assert name == "blue" or may_load.wait(20)

    shelf = Shelf(2, wait)
    shelf.ask("blue")
    shelf.run()
    slow, model = shelf.ask("red"), shelf.ask(None, 5)
    assert shelf.run(max_steps=20) == [model]
    held = shelf.ask("blue")
    assert shelf.run(max_steps=20) == [held]
    may_load.set()
    assert shelf.run() == [slow]


def test_shelf_adapter_that_cannot_be_loaded_refuses_its_requests_and_no_others() -> None:
    def fail(name: str) -> None:
        if name == "red":
            raise OSError("no such file")

    shelf = Shelf(1, fail)
    for name in ("red", "blue", "red"):
        shelf.ask(name)
    news = []
    while shelf.batch.has_work:
        news += shelf.batch.step()
    refusals = {number: refusal for number, *_, refusal in news}
    assert refusals[0] == refusals[2] == "the adapter 'red' cannot be loaded: no such file"
    assert refusals[1] is None


def test_shelf_adapter_that_fails_after_its_client_has_left_refuses_nobody_else() -> None:
    may_fail = threading.Event()

    def fail(name: str) -> None:
        if name == "red":
            assert may_fail.wait(20)
            raise OSError("no such file")

    shelf = Shelf(1, fail)
    left = shelf.ask("red")
    shelf.run(max_steps=2)
    shelf.batch.cancel(left)
    other = shelf.ask("blue")
    may_fail.set()
    news = []
    while shelf.batch.has_work:
        news += shelf.batch.step()
    assert [(number, refusal) for number, *_, refusal in news] == [(other, None)]


def test_shelf_cancelled_requests_leave_nothing_behind() -> None:
    shelf = Shelf(1)
    running, other = shelf.ask("red", 100), shelf.ask(None, 100)
    shelf.run(max_steps=30)
    waiting = shelf.ask("blue")
    for number in (waiting, running, other):
        shelf.batch.cancel(number)
    assert not shelf.batch.has_work
    shelf.ask("green")
    shelf.batch.clear()
    assert not shelf.batch.has_work


def service_with_adapters(text: str = "hello") -> Service:
    """A service with the adapter `red`."""
    engine = scripted(text)
    service = make_service(engine)
    red = replace(service.model, name="red", fingerprint="fp_red", parent="toy")
    service.model = replace(service.model, adapters={"red": red})
    service.metrics = make_metrics("toy", engine, Gate(1, 1), "r1", max_adapters=1)
    return service


def test_api_adapter_by_either_name_reaches_the_engine_and_names_itself_in_the_answer() -> None:
    service = service_with_adapters()
    api = build_api(service)
    for name, path, body in (
        ("red", CHAT, {"messages": USER}), ("toy:red", COMPLETION, {"prompt": "x"}), ("toy", COMPLETION, {"prompt": "x"}),
    ):  # fmt: skip
        answer = request(api, "POST", path, json={"model": name, **body}).json()
        assert answer["model"] == name.removeprefix("toy:")
        assert answer["system_fingerprint"] == ("fp_1" if name == "toy" else "fp_red")
    assert isinstance(service.engine, ScriptedEngine)
    assert [sampling.adapter for _, sampling in service.engine.seen] == ["red", "red", None]
    assert request(api, "POST", "/tokenize", json={"model": "toy:red", "prompt": "ab"}).json()["tokens"] == byte_codec().encode_text("ab")
    refused = request(api, "POST", COMPLETION, json={"model": "toy:blue", "prompt": "x"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (404, "model_not_found")
    assert "with the adapters red" in refused.json()["error"]["message"]
    text = request(api, "GET", "/metrics").text
    assert 'slipway_adapter_requests_total{adapter="red",model_name="toy",replica="r1"} 2.0' in text
    assert 'running_lora_adapters="",waiting_lora_adapters=""}' in text


def test_api_models_lists_adapters_with_their_parent() -> None:
    api = build_api(service_with_adapters())
    listed = request(api, "GET", "/v1/models").json()["data"]
    assert [(each["id"], each["parent"]) for each in listed] == [("toy", None), ("red", "toy")]
    assert request(api, "GET", "/v1/models/toy:red").json() == request(api, "GET", "/v1/models/red").json() == listed[1]
    names = request(api, "GET", "/openapi.json").json()["components"]["schemas"]["ChatRequest"]["properties"]["model"]["enum"]
    assert names == ["toy", "red", "toy:red"]
