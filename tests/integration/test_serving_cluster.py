"""A real Ray cluster of three nodes, two gateways and the model from a store: what its clients see while parts of it come and go."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from infra.artifact_store import open_store
from infra.contracts import read_manifest
from infra.errors import ArtifactError, ConfigError
from serving.cluster_config import ClusterConfig
from tests.integration.serving_cluster import HEAD_IP, ServingCluster, wait_until

pytestmark = pytest.mark.slow

BODY = {"model": "toy", "prompt": "lamp", "max_tokens": 100, "ignore_eos": True}
NUM_CLIENTS = 8


@pytest.fixture(scope="module")
def store(toy_quantized: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A store that holds the toy model."""
    url = (tmp_path_factory.mktemp("store") / "artifacts").as_uri()
    open_store(url).push(toy_quantized)
    return url


def values(store: str, digest: str, **serve: Any) -> dict[str, Any]:
    """Values of the chart for two replicas of one core, each on a worker of its own."""
    own = {"cpus_per_replica": 1, "num_replicas": 2, "allow_unsigned": ["toy"], "drain_timeout_s": 60, "request_timeout_s": 60}
    cores = {"limits": {"cpu": 1, "memory": "2Gi"}, "requests": {"cpu": 1, "memory": "2Gi"}}
    return {
        "store": {"url": store, "existingClaim": "store"},
        "workerGroups": {"cpu": {"minReplicas": 2, "maxReplicas": 2, "resources": cores}},
        "config": {"model_name": "toy", "model": {"type": "store", "digest": digest}, "serve": own | serve, "leave_s": 1.0},
    }


@pytest.fixture(scope="module")
def cluster(store: str, toy_quantized: Path) -> Iterator[ServingCluster]:
    made = ServingCluster(values(store, read_manifest(toy_quantized).digest), variables={"SLIPWAY_STORE": store})
    try:
        made.start()
        wait_until(lambda: all(len(gateway.replicas()) == 2 for gateway in made.gateways), 120, "two replicas at each gateway")
        yield made
    finally:
        made.stop()


def ask(url: str, prompt: str, **changes: Any) -> httpx.Response:
    return httpx.post(f"{url}/v1/completions", json={**BODY, "prompt": prompt, **changes}, timeout=90)


def test_replica_of_an_unsigned_model_or_of_another_engine_does_not_start(
    store: str, toy_quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What one machine checks before it serves, each node checks."""
    from serving.cluster_app import settle

    monkeypatch.setenv("SLIPWAY_STORE", store)
    monkeypatch.setenv("SLIPWAY_HOME", str(tmp_path))
    source = {"type": "store", "digest": read_manifest(toy_quantized).digest}
    said: dict[str, Any] = {"host": "0.0.0.0", "cpus_per_replica": 1, "allow_unsigned": ["toy"]}

    def config(**changes: Any) -> ClusterConfig:
        return ClusterConfig.model_validate({"model_name": "toy", "model": source, "serve": {**said, **changes}})

    assert settle(config(), "").model_dir.is_relative_to(tmp_path)
    with pytest.raises(ArtifactError, match="allow_unsigned"):
        settle(config(allow_unsigned=[]), "")
    with pytest.raises(ConfigError, match="the engine 'vllm' does not read"):
        settle(config(engine="vllm"), "")


def under_load(urls: list[str], disturb: Callable[[], Awaitable[None]]) -> tuple[list[int], list[str]]:
    """Statuses of whole answers and last events of streams, of clients that ask without a pause while something is done."""

    async def clients(client: httpx.AsyncClient, number: int, is_over: asyncio.Event) -> tuple[list[int], list[str]]:
        statuses, ends = [], []
        while not is_over.is_set():
            body = {**BODY, "prompt": f"{number} {len(statuses)} {len(ends)}"}
            url = urls[number % len(urls)] + "/v1/completions"
            if number % 2:
                statuses.append((await client.post(url, json=body)).status_code)
                continue
            async with client.stream("POST", url, json={**body, "stream": True}) as answer:
                statuses.append(answer.status_code)
                ends.append((await answer.aread()).decode().rsplit("data: ", 1)[-1].strip())
        return statuses, ends

    async def scene() -> tuple[list[int], list[str]]:
        is_over = asyncio.Event()
        async with httpx.AsyncClient(timeout=90) as client:
            asking = [asyncio.create_task(clients(client, number, is_over)) for number in range(NUM_CLIENTS)]
            await asyncio.sleep(1.0)
            await disturb()
            await asyncio.sleep(1.0)
            is_over.set()
            found = await asyncio.gather(*asking)
        return [status for statuses, _ in found for status in statuses], [end for _, ends in found for end in ends]

    return asyncio.run(scene())


def test_cluster_each_gateway_answers_from_replicas_of_both_nodes(cluster: ServingCluster) -> None:
    """The model came out of the store into the home of each worker, and none to the head's."""
    answers = {ask(gateway.url, "lamp").json()["choices"][0]["text"] for gateway in cluster.gateways}
    assert len(answers) == 1
    homes = [len(list(node.home.glob("artifacts/*/manifest.json"))) for node in cluster.nodes]
    assert homes == [0, 1, 1]
    assert cluster.gateways[0].replicas() == cluster.gateways[1].replicas()


def test_cluster_each_replica_is_counted_at_one_gateway(cluster: ServingCluster) -> None:
    first, second = cluster.gateways
    wait_until(lambda: sorted([*first.counted(), *second.counted()]) == sorted(first.replicas()), 10, "each replica counted once")


def test_replicas_port_without_the_token_answers_403(cluster: ServingCluster) -> None:
    node = cluster.nodes[1]
    assert httpx.get(f"http://{node.ip}:20000/health").status_code == 403


def test_gateway_killed_under_load_costs_the_other_ones_clients_nothing(cluster: ServingCluster) -> None:
    stays, goes = cluster.gateways

    async def kill() -> None:
        goes.process.kill()
        goes.process.wait()

    statuses, ends = under_load([stays.url], kill)
    assert (set(statuses), set(ends)) == ({200}, {"[DONE]"})
    wait_until(lambda: stays.counted() == stays.replicas(), 15, "the one that is left counts all replicas")
    cluster.gateways[1] = cluster.restart_gateway(1)
    wait_until(lambda: len(cluster.gateways[1].replicas()) == 2, 15, "the new one is found")


def test_gateway_told_to_stop_under_load_finishes_all_its_answers(cluster: ServingCluster) -> None:
    goes = cluster.gateways[1]
    seen: list[int] = []

    async def clients_and_balancer() -> None:
        goes.process.send_signal(signal.SIGTERM)
        async with httpx.AsyncClient() as client:
            while (status := (await client.get(f"{goes.url}/health")).status_code) == 200:
                await asyncio.sleep(0.05)
        seen.append(status)

    async def scene() -> list[str]:
        async with httpx.AsyncClient(timeout=90) as client:
            asked = [asyncio.create_task(streamed(client, goes.url, number)) for number in range(NUM_CLIENTS)]
            await asyncio.sleep(0.3)
            await clients_and_balancer()
            return list(await asyncio.gather(*asked))

    assert set(asyncio.run(scene())) == {"[DONE]"}
    assert seen == [503]
    assert goes.process.wait(30) == 0
    cluster.gateways[1] = cluster.restart_gateway(1)
    wait_until(lambda: len(cluster.gateways[1].replicas()) == 2, 15, "the new one is found")


async def streamed(client: httpx.AsyncClient, url: str, number: int) -> str:
    async with client.stream("POST", f"{url}/v1/completions", json={**BODY, "prompt": f"s {number}", "stream": True}) as answer:
        return (await answer.aread()).decode().rsplit("data: ", 1)[-1].strip()


def test_another_config_under_load_exchanges_replicas_and_costs_no_answer(cluster: ServingCluster) -> None:
    """As `helm upgrade` with another config does: serveConfigV2 alone is another."""
    before = cluster.gateways[0].replicas()
    config = yaml.safe_load(cluster.service["serveConfigV2"])
    config["applications"][0]["args"]["config"]["serve"]["default_max_tokens"] = 7

    def is_exchanged() -> bool:
        now = cluster.gateways[0].replicas()
        return len(now) == 2 and not now & before

    async def deploy() -> None:
        await asyncio.to_thread(cluster.deploy, yaml.safe_dump(config))
        await asyncio.to_thread(wait_until, is_exchanged, 240, "both replicas exchanged")

    statuses, ends = under_load([gateway.url for gateway in cluster.gateways], deploy)
    assert (set(statuses), set(ends)) == ({200}, {"[DONE]"})
    answer = httpx.post(f"{cluster.gateways[0].url}/v1/completions", json={"model": "toy", "prompt": "lamp", "ignore_eos": True})
    assert answer.json()["usage"]["completion_tokens"] == 7


def test_node_drained_and_lost_under_load_costs_no_answer(cluster: ServingCluster) -> None:
    """As `kubectl drain` does: the pod's preStop, then its end; then a new pod."""
    goes = cluster.nodes[1]

    async def drain() -> None:
        drained = goes.drain(60)
        assert await asyncio.to_thread(drained.wait, 90) == 0
        await asyncio.to_thread(goes.kill)

    statuses, ends = under_load([gateway.url for gateway in cluster.gateways], drain)
    assert (set(statuses), set(ends)) == ({200}, {"[DONE]"})
    cluster.nodes[1] = cluster.add_node(is_head=False)
    wait_until(lambda: len(cluster.gateways[0].replicas()) == 2, 240, f"a replica on the new node: {cluster.status()}")


def test_node_lost_at_once_under_load_costs_no_whole_answer(cluster: ServingCluster) -> None:
    async def kill() -> None:
        await asyncio.to_thread(cluster.nodes[2].kill)

    statuses, ends = under_load([gateway.url for gateway in cluster.gateways], kill)
    assert set(statuses) == {200}
    errors = [json.loads(end)["error"]["code"] for end in ends if end != "[DONE]"]
    assert set(errors) <= {"replica_lost"}
    assert len(errors) <= NUM_CLIENTS // 2
    assert "[DONE]" in ends[-NUM_CLIENTS // 2 :]


def test_model_that_sleeps_is_woken_by_a_request(cluster: ServingCluster, store: str, toy_quantized: Path) -> None:
    """A gateway, which is no part of Ray, rings at Ray Serve's proxy."""
    sleeps = {"min_replicas": 0, "max_replicas": 1, "zero_delay_s": 0.5, "down_delay_s": 0.5}
    cluster.render(values(store, read_manifest(toy_quantized).digest, autoscale=sleeps))
    cluster.deploy(cluster.service["serveConfigV2"])
    cluster.gateways[0].process.kill()
    cluster.gateways[0].process.wait()
    cluster.gateways[0] = cluster.restart_gateway(0)
    wait_until(
        lambda: httpx.get(f"http://{HEAD_IP}:{cluster.serve_port}/wake").status_code == 403, 120, "a bell, which strangers do not ring"
    )
    wait_until(lambda: not cluster.gateways[1].replicas(), 120, "nobody asks, and no replica is left")
    assert httpx.get(f"{cluster.gateways[0].url}/health").json() == {"status": "ok", "replicas": 0}
    assert ask(cluster.gateways[0].url, "wake up").status_code == 200


def test_head_lost_answers_go_on(cluster: ServingCluster) -> None:
    """The last test: nobody starts replicas any more."""
    cluster.nodes[0].kill()
    deadline_s = time.monotonic() + 20
    while time.monotonic() < deadline_s:
        assert ask(cluster.gateways[1].url, f"{time.monotonic()}", max_tokens=8).status_code == 200
        time.sleep(0.5)
