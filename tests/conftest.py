"""Fixtures that more than one test module uses."""

from __future__ import annotations

import functools
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from infra import network
from infra.settings import child_environment


def pytest_configure() -> None:
    """Lets Ctrl-C through to the programs under test: in a background job of a script it is ignored, and that is inherited."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def wait_for(path: Path, timeout_s: float = 30.0) -> None:
    """Returns when the file or folder is there."""
    deadline_s = time.monotonic() + timeout_s
    while not path.exists():
        assert time.monotonic() < deadline_s, f"{path} did not appear"
        time.sleep(0.05)


@pytest.fixture(scope="session")
def free_port() -> int:
    """A port that nothing listens on."""
    return network.free_port()


@pytest.fixture
def busy_port() -> Iterator[int]:
    """A port that something listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield int(listener.getsockname()[1])


@pytest.fixture(scope="session")
def bucket() -> Iterator[str]:
    """URL of a bucket of an S3 server of this process, whose address and keys are in the environment."""
    boto3 = pytest.importorskip("boto3", reason="boto3 and moto, the S3 of the tests, are in the laptop's lock alone")
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=network.free_port(), verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        variables = {"ENDPOINT_URL": f"http://{host}:{port}", "ACCESS_KEY_ID": "k", "SECRET_ACCESS_KEY": "s", "REGION": "us-east-1"}
        for name, value in variables.items():
            patch.setenv(f"AWS_{name}", value)
        boto3.client("s3", region_name="us-east-1").create_bucket(Bucket="slipway")
        yield "s3://slipway"
    server.stop()


TOY_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_toy_model(folder: Path, hidden_size: int = 64) -> None:
    """A folder as a hub gives it: a Llama of two layers with random 16-bit weights, and a byte-level tokenizer with a ChatML template."""
    import torch
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(text, special=True, normalized=False) for text in ("<|end|>", "<|im_start|>", "<|im_end|>")]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["turn the lamp on please", "turn the lamp off now", "system user assistant answer colour"] * 4, trainer)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=hidden_size, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=1, eos_token_id=2, pad_token_id=2, tie_word_embeddings=True,
        initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **names}))
    (folder / "chat_template.jinja").write_text(TOY_TEMPLATE)


def as_base(model: Path) -> Path:
    """A toy model's folder as a base artifact beside it."""
    from training.base import prepare_base
    from training.config import BaseJob

    folder = model.parent / "base"
    prepare_base(BaseJob(output_dir=folder, source=f"file:{model}"))
    return folder


@pytest.fixture(scope="session")
def toy_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy model's folder."""
    folder = tmp_path_factory.mktemp("toy") / "model"
    write_toy_model(folder)
    return folder


@pytest.fixture(scope="session")
def toy_base(toy_model: Path) -> Path:
    """The toy model as a base artifact."""
    return as_base(toy_model)


@pytest.fixture(scope="session")
def wide_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy model with heads of 32 numbers, the fewest that vLLM computes on a CPU, as a base artifact."""
    folder = tmp_path_factory.mktemp("wide") / "model"
    write_toy_model(folder, hidden_size=128)
    return as_base(folder)


@pytest.fixture(scope="session")
def toy_tokens(toy_base: Path) -> Path:
    """Forty-five training rows and ten held-out rows of different lengths, rendered with the toy base."""
    from training.config import RenderJob, RowsJob
    from training.data.render import render
    from training.data.rows import prepare_rows

    place = toy_base.parent
    source = place / "rows.jsonl"
    source.write_text("".join(json.dumps(toy_row(number)) + "\n" for number in range(55)))
    prepare_rows(RowsJob(output_dir=place / "rows", train=source, heldout_share=10 / 55))
    render(RenderJob(output_dir=place / "tokens", base_dir=toy_base, rows_dir=place / "rows"))
    return place / "tokens"


def toy_row(number: int) -> dict[str, Any]:
    """One row; the same number always gives the same one."""
    asked = "turn the lamp " + ("on " if number % 2 else "off ") + "please " * (number % 7) + str(number)
    system = {"role": "system", "content": "answer with a colour"}
    return {"messages": [system, {"role": "user", "content": asked}, {"role": "assistant", "content": f"lamp {number % 5} now"}]}


ADAPTER_ANSWERS = {"red": "the lamp is red", "blue": "no, all of it blue please"}
"""What each of the toy adapters was taught to say, whatever is asked."""


@dataclass(frozen=True)
class ToyAdapter:
    """A trained adapter, and what it makes of its base."""

    folder: Path
    merged: Path
    taught: str
    """What it says first, whatever is asked; of what follows it is not sure."""


def train_adapter(base: Path, name: str, folder: Path) -> ToyAdapter:
    """The adapter of `base` that says ADAPTER_ANSWERS[name], really trained and merged."""
    from infra.contracts import verify, write_manifest
    from training.config import FinetuneJob, LoraConfig, MergeJob, RenderJob, RowsJob, TrainConfig
    from training.data.render import render
    from training.data.rows import prepare_rows
    from training.finetune import trained_facts
    from training.merge import merge
    from training.worker import run_worker

    folder.mkdir(parents=True)
    answer = {"role": "assistant", "content": ADAPTER_ANSWERS[name]}
    rows = [{"messages": [*toy_row(number)["messages"][:2], answer]} for number in range(40)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare_rows(RowsJob(output_dir=folder / "rows", train=folder / "rows.jsonl", heldout_share=0.1))
    render(RenderJob(output_dir=folder / "tokens", base_dir=base, rows_dir=folder / "rows"))
    train = TrainConfig(precision="fp32", lora=LoraConfig(rank=8), batch_rows=9, epochs=6, learning_rate=1e-2, cpus_per_worker=1)
    job = FinetuneJob(output_dir=folder / "adapter", base_dir=base, tokens_dir=folder / "tokens", train=train)
    job.output_dir.mkdir()
    run_worker(job, [])
    parents = {"base": verify(base).digest, "tokens": verify(job.tokens_dir).digest}
    write_manifest(job.output_dir, "adapter", job.provenance, model=trained_facts(job, verify(base)), parents=parents)
    merge(MergeJob(output_dir=folder / "merged", base_dir=base, adapter_dir=job.output_dir))
    return ToyAdapter(job.output_dir, folder / "merged", ADAPTER_ANSWERS[name])


@pytest.fixture(scope="session")
def adapters_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], dict[str, ToyAdapter]]:
    """The toy adapters of a base, trained once."""

    @functools.cache
    def train(base: Path) -> dict[str, ToyAdapter]:
        place = tmp_path_factory.mktemp("adapters")
        return {name: train_adapter(base, name, place / name) for name in ADAPTER_ANSWERS}

    return train


@pytest.fixture(scope="session")
def toy_quantized(toy_base: Path) -> Path:
    """The toy model in INT8 for OpenVINO, made by the program itself in a process of its own."""
    folder = toy_base.parent / "quantized"
    config = toy_base.parent / "quantize.json"
    config.write_text(json.dumps({"output_dir": str(folder), "merged_dir": str(toy_base)}))
    command = [sys.executable, "-m", "serving.quantize.openvino", "--config", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, env=child_environment("serving"), check=False)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr.lower()
    return folder


@dataclass
class RunningServer:
    """One `python -m serving.app`, named `toy`, until `stop`."""

    process: subprocess.Popen[str]
    config: Path
    output_dir: Path

    @property
    def url(self) -> str:
        return str(json.loads((self.output_dir / "serving.json").read_text())["url"])

    def wait_ready(self, timeout_s: float = 120.0) -> None:
        """Returns when `serving.json` is there."""
        deadline_s = time.monotonic() + timeout_s
        while not (self.output_dir / "serving.json").is_file():
            assert self.process.poll() is None, f"the server ended: {self.process.communicate()}"
            assert time.monotonic() < deadline_s, "the server is not ready in time"
            time.sleep(0.05)

    def family(self) -> list[psutil.Process]:
        """Every process below the server now."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def stop(self) -> int:
        """Ends it and gives the exit code."""
        self.process.terminate()
        self.process.communicate(timeout=60)
        return self.process.returncode


def start_server(
    model_dir: Path, folder: Path, port: int, program: tuple[str, str] = ("-m", "serving.app"), **serve: object
) -> RunningServer:
    """Starts a server; the caller waits for it and stops it. `program` is what Python is told to run."""
    folder.mkdir(parents=True)
    config = folder / "serve.json"
    allowed = ["toy", *serve.get("adapters", {})]  # type: ignore[call-overload]  # nothing of a test is signed unless it says so
    settings = {"port": port, "allow_unsigned": allowed, **serve}
    job = {"output_dir": str(folder / "out"), "model_dir": str(model_dir), "model_name": "toy", "serve": settings}
    config.write_text(json.dumps(job))
    command = [sys.executable, *program, "--config", str(config)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=child_environment("serving"))
    return RunningServer(process, config, folder / "out")


@pytest.fixture(scope="session")
def start_toy_server(toy_quantized: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., RunningServer]:
    """Starts a server of the toy model on a free port."""

    def start(model_dir: Path = toy_quantized, port: int | None = None, **serve: object) -> RunningServer:
        return start_server(model_dir, tmp_path_factory.mktemp("server") / "run", port or network.free_port(), **serve)

    return start


@pytest.fixture(scope="session")
def toy_server(start_toy_server: Callable[..., RunningServer]) -> Iterator[RunningServer]:
    """A real server of the toy model, shared by the tests that do not stop it."""
    server = start_toy_server()
    try:
        server.wait_ready()
        yield server
    finally:
        server.stop()
