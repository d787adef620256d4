"""Both clients against real servers: the plain one, and two replicas of it in Ray Serve."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hotswap.v1 import inference_pb2, inference_pb2_grpc
from hotswap_client import (
    AsyncClient,
    Client,
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    Residency,
    ServingPath,
    Unauthenticated,
)
from support.deployed import plain_server, ray_application
from support.keys import Keyring

LORAS = {f"acme/task{number}": number for number in range(1, 5)}
NAMES = ["", *LORAS]
LONG = 3000  # tokens; seconds, even of the tiny base


@dataclass
class Target:
    """A server, or `replicas` of it. `key` may do all, `other_key` uses the adapters of globex."""

    address: str
    replicas: int
    key: str
    other_key: str


@pytest.fixture(scope="module")
def store(tmp_path_factory, write_lora) -> Path:
    directory = tmp_path_factory.mktemp("store")
    for name, seed in LORAS.items():
        write_lora(directory / name / "1", seed=seed)
    write_lora(directory / "acme/broken/1", seed=9)
    weights = directory / "acme/broken/1/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    return directory


@pytest.fixture(scope="module", params=["plain", pytest.param("ray", marks=pytest.mark.slow)])
def target(request, tiny_base, store, tmp_path_factory) -> Iterator[Target]:
    directory = tmp_path_factory.mktemp("serving")
    keyring = Keyring(directory / "keys.yaml")
    (_, admin), (_, user) = *keyring.add("boss", "admin", "*"), *keyring.add("guest", "user", "globex/*")
    keys = [text.removeprefix("Bearer ") for text in (admin, user)]
    settings = {"base": str(tiny_base), "store": str(store), "kv_cache_bytes": "4MiB", "threads": 1}
    settings["keys_file"] = str(keyring.path)
    if request.param == "plain":
        with plain_server(settings) as address:
            yield Target(address, 1, *keys)
    else:
        pytest.importorskip("ray")
        with ray_application(settings, directory, num_replicas=2) as address:
            yield Target(address, 2, *keys)


@pytest.fixture
def client(target) -> Iterator[Client]:
    with Client(target.address, api_key=target.key, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def expected(tiny_base, store) -> dict[str, tuple[int, ...]]:
    """PEFT's greedy tokens after "hello", by adapter."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(tiny_base)("hello", return_tensors="pt")["input_ids"]
    tokens = {}
    for name in NAMES:
        model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
        if name:
            model = PeftModel.from_pretrained(model, store / name / "1")
        with torch.no_grad():
            output = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False
            )
        tokens[name] = tuple(output[0, ids.shape[1] :].tolist())
    return tokens


def greedy(adapter: str, **options):
    return {"adapter": adapter, "prompt": "hello", "max_new_tokens": 12, "temperature": 0.0, **options}


def endless(adapter: str = "acme/task1"):
    return greedy(adapter, max_new_tokens=LONG, ignore_eos=True)


def wait_idle(client: Client, adapter: str = "acme/task1") -> None:
    """Until no request runs on the adapter, anywhere."""
    until = time.monotonic() + 30
    while any(client.adapters.show(adapter).running_requests for _ in range(6)):
        assert time.monotonic() < until, "the request goes on after its call has ended"
        time.sleep(0.05)


def test_every_adapter_answers_as_peft_does(client, expected):
    for name in NAMES:
        result = client.generate(**greedy(name))
        assert result.token_ids == expected[name]
        assert result.path is (ServingPath.BATCHED if name else ServingPath.BASE)
        assert (result.adapter, result.version) == ((name, 1) if name else (None, None))
    assert len(set(expected.values())) == len(NAMES)


async def test_calls_at_once_are_answered_as_each_alone(target, expected):
    async with AsyncClient(target.address, api_key=target.key, timeout=60) as client:
        results = await asyncio.gather(*(client.generate(**greedy(name)) for name in NAMES * 4))
    assert [result.token_ids for result in results] == [expected[name] for name in NAMES * 4]


def test_a_stream_adds_up_to_the_answer(client, expected):
    stream = client.stream(**greedy("acme/task2"))
    deltas = list(stream)
    assert len(deltas) > 2, "it comes piece by piece"
    assert tuple(token for delta in deltas for token in delta.token_ids) == expected["acme/task2"]
    assert stream.result is deltas[-1].result
    assert stream.result.token_ids == expected["acme/task2"]
    assert stream.result.digest


def test_score_and_tokenize(client):
    tokens = client.tokenize(prompt="hello").token_ids
    assert len(tokens) == 5
    scores = {name: client.score(text="hello", adapter=name) for name in NAMES}
    assert {len(score.logprobs) for score in scores.values()} == {4}
    assert len({score.total_logprob for score in scores.values()}) == len(NAMES)


def test_adapters_are_listed(client):
    listed = {adapter.name: adapter for adapter in client.adapters.list()}
    assert listed.keys() == {*LORAS, "acme/broken"}
    assert listed["acme/task1"].method == "lora"
    assert client.adapters.show("acme/task1").digest == listed["acme/task1"].digest


@pytest.mark.parametrize(
    ("options", "kind", "reason", "field"),
    [
        (greedy("acme/unknown"), NotFound, "ADAPTER_NOT_FOUND", None),
        (greedy("acme/broken"), FailedPrecondition, "ADAPTER_INVALID", None),
        (greedy("", top_p=7.0), InvalidArgument, "INVALID_REQUEST", "sampling.top_p"),
    ],
)
async def test_errors_tell_as_much(target, options, kind, reason, field):
    async with AsyncClient(target.address, api_key=target.key, timeout=60) as client:
        with pytest.raises(kind) as unary:
            await client.generate(**options)
        with pytest.raises(kind) as stream:  # and no delta before
            await anext(aiter(client.stream(**options)))
    for error in (unary.value, stream.value):
        assert error.reason == reason
        assert getattr(error, "field", None) == field
        assert error.message


def test_leaving_a_stream_ends_its_request(client):
    with client.stream(**endless()) as stream:
        next(stream)
    wait_idle(client)


def test_a_deadline_ends_the_request(client):
    with pytest.raises(DeadlineExceeded):
        client.generate(**endless(), timeout=0.5)
    with pytest.raises(DeadlineExceeded):
        list(client.stream(**endless(), timeout=0.5))
    wait_idle(client)


async def test_a_cancelled_call_ends_its_request(target):
    async with AsyncClient(target.address, api_key=target.key, timeout=60) as client:
        calls = [asyncio.create_task(client.generate(**endless())) for _ in range(3)]
        await asyncio.sleep(0.3)
        for call in calls:
            call.cancel()
        assert all(
            isinstance(end, asyncio.CancelledError)
            for end in await asyncio.gather(*calls, return_exceptions=True)
        )
    with Client(target.address, api_key=target.key, timeout=60) as client:
        await asyncio.to_thread(wait_idle, client)


def test_the_callers_request_id_comes_back(target):
    message = inference_pb2.GenerateRequest(sampling={"max_new_tokens": 1})
    message.input.prompt = "hello"
    with grpc.insecure_channel(target.address) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        metadata = (("x-request-id", "mine-7"), ("authorization", f"Bearer {target.key}"))
        _, unary = stub.Generate.with_call(message, metadata=metadata, timeout=60)
        stream = stub.GenerateStream(
            inference_pb2.GenerateStreamRequest(input=message.input, sampling=message.sampling),
            metadata=metadata,
            timeout=60,
        )
        assert list(stream)
        for call in (unary, stream):
            assert dict(call.trailing_metadata())["x-request-id"] == "mine-7"


def test_health_is_told(target):
    with grpc.insecure_channel(target.address) as channel:
        reply = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=60)
    assert reply.status == health_pb2.HealthCheckResponse.SERVING


def test_an_adapters_calls_meet_it_in_memory(client, target):
    """Each adapter is one replica's, and not all are the same one's."""
    for name in LORAS:
        client.generate(**greedy(name))
    if target.replicas > 1:
        time.sleep(2)  # in which Ray's proxy hears who holds what
    for name in LORAS:
        assert {client.adapters.show(name).residency for _ in range(8)} == {Residency.DEVICE}, name
    shown = {
        frozenset(adapter.name for adapter in client.adapters.list() if adapter.residency is Residency.DEVICE)
        for _ in range(20)
    }
    assert len(shown) == target.replicas
    assert frozenset.union(*shown) == LORAS.keys()


def test_callers_are_known_by_their_keys(target):
    with Client(target.address) as client, pytest.raises(Unauthenticated):
        client.generate(**greedy(""))
    with Client(target.address, api_key=target.other_key) as client:
        assert client.generate(**greedy("")).token_ids
        with pytest.raises(NotFound):  # as if it were not there
            client.generate(**greedy("acme/task1"))
        with pytest.raises(PermissionDenied):
            client.adapters.load("acme/task1")
