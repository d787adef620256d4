"""A client of several servers: who gets which call, in turn or by adapter, and who is left out."""

from __future__ import annotations

import asyncio
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from hotswap.v1 import adapters_pb2, adapters_pb2_grpc, inference_pb2, inference_pb2_grpc
from hotswap_client import TLS, AsyncClient, Client, Unavailable
from hotswap_client._replicas import one_target
from support.certificates import Authority
from support.running import wait_until

NAMES = [f"tenant-{i % 7}/adapter-{i}" for i in range(60)]
SERVICE = "hotswap.v1.InferenceService"
Status = health_pb2.HealthCheckResponse


@dataclass
class Replica:
    """Says its number as the text of every answer; `refusals` calls are answered UNAVAILABLE first."""

    number: int
    server: grpc.Server
    port: int = 0
    health: health.HealthServicer = field(default_factory=health.HealthServicer)
    calls: list[tuple[str, str | None]] = field(default_factory=list)
    refusals: int = 0
    breaks_streams: bool = False

    def serving(self, whether: bool) -> None:
        self.health.set(SERVICE, Status.SERVING if whether else Status.NOT_SERVING)

    def note(self, rpc: str, context: grpc.ServicerContext) -> None:
        self.calls.append((rpc, dict(context.invocation_metadata()).get("x-adapter")))
        if self.refusals:
            self.refusals -= 1
            context.abort(grpc.StatusCode.UNAVAILABLE, "not now")


def _start(number: int, credentials: grpc.ServerCredentials | None = None) -> Replica:
    replica = Replica(number, grpc.server(ThreadPoolExecutor(8)))

    def generate(self: Any, request: Any, context: grpc.ServicerContext) -> Any:
        replica.note("Generate", context)
        return inference_pb2.GenerateResponse(text=str(number))

    def stream(self: Any, request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        replica.note("GenerateStream", context)
        yield inference_pb2.GenerateStreamResponse(delta=inference_pb2.Delta(text=str(number)))
        if replica.breaks_streams:
            context.abort(grpc.StatusCode.UNAVAILABLE, "gone")
        yield inference_pb2.GenerateStreamResponse(completion=inference_pb2.Completion())

    def score(self: Any, request: Any, context: grpc.ServicerContext) -> Any:
        replica.note("Score", context)
        return inference_pb2.ScoreResponse()

    def get(self: Any, request: Any, context: grpc.ServicerContext) -> Any:
        replica.note("GetAdapter", context)
        return adapters_pb2.GetAdapterResponse()

    handlers = {"Generate": generate, "GenerateStream": stream, "Score": score}
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(
        type("Inference", (inference_pb2_grpc.InferenceServiceServicer,), handlers)(), replica.server
    )
    adapters_pb2_grpc.add_AdapterServiceServicer_to_server(
        type("Admin", (adapters_pb2_grpc.AdapterServiceServicer,), {"GetAdapter": get})(), replica.server
    )
    health_pb2_grpc.add_HealthServicer_to_server(replica.health, replica.server)
    replica.serving(True)
    if credentials is None:
        replica.port = replica.server.add_insecure_port("127.0.0.1:0")
    else:
        replica.port = replica.server.add_secure_port("127.0.0.1:0", credentials)
    replica.server.start()
    return replica


@pytest.fixture
def replicas() -> Iterator[list[Replica]]:
    started = [_start(number) for number in range(3)]
    yield started
    for event in [replica.server.stop(None) for replica in started]:
        event.wait()


@pytest.fixture
def targets(replicas: list[Replica]) -> list[str]:
    return [f"127.0.0.1:{replica.port}" for replica in replicas]


def places(client: Client, names: list[str] = NAMES) -> dict[str, int]:
    """The number of the replica that answers for each adapter."""
    return {name: int(client.generate(adapter=name, prompt="x").text) for name in names}


def knows(client: Client, left: int) -> Callable[[], bool]:
    """Whether the client sends nothing to the replica `left` any more."""
    return lambda: left not in places(client).values()


def test_each_adapter_stays_on_one_replica_and_all_replicas_have_some(targets):
    with Client(targets=targets, affinity="adapter") as client:
        before = places(client)
        assert set(before.values()) == {0, 1, 2}
        assert max(Counter(before.values()).values()) < 40
        for _ in range(3):
            assert places(client) == before
    with Client(targets=targets[::-1], affinity="adapter") as another:
        assert places(another) == before


def test_every_call_that_names_an_adapter_goes_to_its_replica(replicas, targets):
    with Client(targets=targets, affinity="adapter") as client:
        for name in NAMES[:20]:
            place = replicas[int(client.generate(adapter=name, prompt="x").text)]
            assert next(iter(client.stream(adapter=f"{name}@3", prompt="x"))).text == str(place.number)
            client.score(adapter=f"{name}@stable", text="x")
            client.adapters.show(name, version=2)
            rpcs = ["Generate", "GenerateStream", "Score", "GetAdapter"]
            assert place.calls[-4:] == [(rpc, name) for rpc in rpcs]


async def test_the_asyncio_client_finds_the_same_places(targets):
    with Client(targets=targets, affinity="adapter") as client:
        expected = await asyncio.to_thread(places, client)
    async with AsyncClient(targets=targets, affinity="adapter") as client:
        answers = await asyncio.gather(*(client.generate(adapter=name, prompt="x") for name in NAMES))
        streams = [[d.text async for d in client.stream(adapter=name, prompt="x")] for name in NAMES[:5]]
    assert {name: int(answer.text) for name, answer in zip(NAMES, answers, strict=True)} == expected
    assert [int(texts[0]) for texts in streams] == [expected[name] for name in NAMES[:5]]


def test_calls_for_the_base_are_spread_whatever_the_affinity(replicas, targets):
    with Client(targets=targets, affinity="adapter") as client:
        answered = Counter(client.generate(prompt="x").text for _ in range(60))
    assert set(answered) == {"0", "1", "2"}
    assert all(adapter is None for replica in replicas for _, adapter in replica.calls)


def test_several_targets_take_turns_by_default(targets):
    with Client(targets=targets) as client:
        wait_until(lambda: len(set(places(client, NAMES[:9]).values())) == 3)  # all are connected
        assert Counter(client.generate(adapter="acme/one", prompt="x").text for _ in range(30)) == {
            "0": 10,
            "1": 10,
            "2": 10,
        }


def test_a_replica_that_does_not_say_serving_is_left_and_only_its_adapters_move(replicas, targets):
    with Client(targets=targets, affinity="adapter") as client:
        before = places(client)
        replicas[1].serving(False)
        wait_until(knows(client, left=1))
        moved = places(client)
        assert {name for name in NAMES if moved[name] != before[name]} == {
            name for name, place in before.items() if place == 1
        }
        replicas[1].serving(True)
        wait_until(lambda: places(client) == before)


def test_without_affinity_too_a_replica_that_does_not_say_serving_is_left(replicas, targets):
    with Client(targets=targets, retries=0) as client:
        wait_until(lambda: len(set(places(client, NAMES[:9]).values())) == 3)
        replicas[2].serving(False)
        wait_until(lambda: 2 not in places(client, NAMES[:9]).values())
        assert set(places(client).values()) == {0, 1}


def test_a_replica_that_is_gone_costs_no_unary_call_and_moves_only_its_adapters(replicas, targets):
    with Client(targets=targets, affinity="adapter") as client:
        before = places(client)
        replicas[0].server.stop(None).wait()
        moved = places(client)
    assert {name for name in NAMES if moved[name] != before[name]} == {
        name for name, place in before.items() if place == 0
    }


def test_what_was_refused_before_the_first_message_is_tried_again_and_a_broken_stream_is_not(
    replicas, targets
):
    for replica in replicas:
        replica.refusals = 1
        replica.breaks_streams = True
    with Client(targets=targets) as client:
        assert client.generate(adapter="acme/one", prompt="x").text in "012"
        for replica in replicas:
            replica.refusals = 0
            replica.calls.clear()
        stream = client.stream(adapter="acme/one", prompt="x")
        assert next(stream).text in "012"
        with pytest.raises(Unavailable, match="gone"):
            next(stream)
    assert sum(len(replica.calls) for replica in replicas) == 1


def test_one_target_of_several_addresses_is_balanced_as_well(targets):
    with Client(targets=[f"ipv4:{','.join(targets)}"], affinity="adapter") as client:
        assert set(places(client).values()) == {0, 1, 2}


def test_with_tls_all_have_the_name_that_is_asked_for(tmp_path):
    authority = Authority()
    (tmp_path / "ca.crt").write_bytes(authority.cert)
    pairs = [authority.issue(name, name) for name in ("replicas.example", "replicas.example", "else.example")]
    credentials = [grpc.ssl_server_credentials([(pair.key, pair.cert)]) for pair in pairs]
    started = [_start(number, own) for number, own in enumerate(credentials)]
    tls = TLS(ca=tmp_path / "ca.crt", server_name="replicas.example")
    targets = [f"127.0.0.1:{replica.port}" for replica in started]
    with Client(targets=targets, affinity="adapter", tls=tls, api_key="s3cret") as client:
        assert set(places(client).values()) == {0, 1}
    for replica in started:
        replica.server.stop(None).wait()


def test_many_threads_share_a_client(targets):
    with Client(targets=targets, affinity="adapter") as client:
        before = places(client)
        seen: list[dict[str, int]] = []
        threads = [threading.Thread(target=lambda: seen.append(places(client))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert seen == [before] * 4


@pytest.mark.parametrize(
    ("given", "target"),
    [
        (["a:1"], "a:1"),
        (["dns:///replicas.example:50051"], "dns:///replicas.example:50051"),
        (["127.0.0.1:1", "127.0.0.2:2", "127.0.0.1:1"], "ipv4:127.0.0.1:1,127.0.0.2:2"),
        (["[::1]:1", "[::2]:2"], "ipv6:[::1]:1,[::2]:2"),
        (["localhost:1", "127.0.0.1:2"], "ipv4:127.0.0.1:1,127.0.0.1:2"),
    ],
)
def test_targets_become_one(given, target):
    assert one_target(given) == target


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"targets": []}, "at least one"),
        ({"targets": "a:1,b:2"}, "a list of HOST:PORT"),
        ({"targets": ["127.0.0.1:1", "127.0.0.2"]}, "must be HOST:PORT, got '127.0.0.2'"),
        ({"targets": ["127.0.0.1:1", "dns:///b:2"]}, "must be HOST:PORT, got 'dns:///b:2'"),
        ({"targets": ["127.0.0.1:1", "127.0.0.2:65536"]}, "must be HOST:PORT"),
        ({"targets": ["127.0.0.1:1", "[::1]:2"]}, "no addresses of one kind"),
        ({"target": "a:1", "targets": ["b:1"]}, "exclude one another"),
        ({"affinity": "adapter"}, "needs targets"),
        ({"target": "a:1", "affinity": "adapter"}, "needs targets"),
        ({"targets": ["a:1"], "affinity": "tenant"}, "affinity must be adapter, got 'tenant'"),
        ({"targets": ["127.0.0.1:1", "127.0.0.2:1"], "tls": True}, "server_name"),
        ({"targets": ["192.0.2.1:1", "127.0.0.1:1"], "api_key": "k"}, "allow_plaintext_key"),
    ],
)
def test_what_cannot_be_balanced_is_refused(options, problem):
    for kind in (Client, AsyncClient):
        with pytest.raises(ValueError, match=problem):
            kind(**options)


def test_a_gRPC_that_may_not_hash_headers_is_refused(monkeypatch):
    monkeypatch.setenv("GRPC_EXPERIMENTAL_RING_HASH_SET_REQUEST_HASH_KEY", "false")
    with pytest.raises(ValueError, match="GRPC_EXPERIMENTAL_RING_HASH_SET_REQUEST_HASH_KEY=true"):
        Client(targets=["127.0.0.1:1"], affinity="adapter")
    monkeypatch.delenv("GRPC_EXPERIMENTAL_RING_HASH_SET_REQUEST_HASH_KEY")
    Client(targets=["127.0.0.1:1"]).close()
    assert "GRPC_EXPERIMENTAL_RING_HASH_SET_REQUEST_HASH_KEY" not in os.environ


def test_what_a_client_of_several_shows_of_itself():
    options = {"targets": ["127.0.0.1:1", "127.0.0.1:2"], "affinity": "adapter", "api_key": "s3cret"}
    with Client(**options) as client:
        assert repr(client) == (
            "Client(targets=['127.0.0.1:1', '127.0.0.1:2'], affinity='adapter', api_key='***', timeout=None, "
            "tls=None)"
        )
    Client(targets=options["targets"], tls=TLS(server_name="replicas.example")).close()
