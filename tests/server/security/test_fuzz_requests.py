"""The request surface of a running server: whatever is sent, a documented answer comes, and soon."""

from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from google.protobuf.message_factory import GetMessageClass
from grpc_status import rpc_status
from hotswap.v1 import adapters_pb2, common_pb2, inference_pb2
from hotswap_server import app
from hotswap_server.config import load_settings
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.keys import Keyring

HANGS_S = 60
Code = grpc.StatusCode
METHODS = {
    method.name: method
    for file in (inference_pb2, adapters_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}
# Never INTERNAL or UNKNOWN, and DEADLINE_EXCEEDED would be a hang.
DOCUMENTED = {
    *(Code.INVALID_ARGUMENT, Code.NOT_FOUND, Code.FAILED_PRECONDITION, Code.RESOURCE_EXHAUSTED),
    *(Code.UNAUTHENTICATED, Code.PERMISSION_DENIED, Code.UNIMPLEMENTED, Code.CANCELLED),
}
LEAKS = ("Traceback", "site-packages", ".py", "Error(", "/tmp", "secret-place")


@pytest.fixture(scope="module")
def server(tiny_base, write_lora, tmp_path_factory):
    """A server on a thread, its callers' metadata, and where its store is."""
    place = tmp_path_factory.mktemp("secret-place")
    write_lora(place / "store/acme/one/1", seed=1)
    (place / "store/acme/broken/1").mkdir(parents=True)
    (place / "store/acme/broken/1/adapter_config.json").write_text("{}")
    (place / "store/acme/broken/1/adapter_model.safetensors").write_bytes(b"broken")
    keyring = Keyring(place / "keys.yaml")
    callers = [
        keyring.add("root", "admin", "*"),
        keyring.add("acme", "publisher", "acme/*"),
        keyring.add("other", "user", "other/*"),
        None,
    ]
    loaded = app.load(
        load_settings(
            base=str(tiny_base),
            store=str(place / "store"),
            keys_file=str(place / "keys.yaml"),
            kv_cache_bytes="1MiB",
            max_context=64,
            max_message_bytes="64KiB",
            threads=1,
            port=0,
            metrics_port=0,
        )
    )
    ready: SimpleNamespace = SimpleNamespace(port=0, loop=None, stop=None)
    listening = threading.Event()

    async def serve() -> None:
        ready.loop, ready.stop = asyncio.get_running_loop(), asyncio.Event()

        def note(described: app.Ready) -> None:
            ready.port = described.port
            listening.set()

        await app.run(loaded, note, stop=ready.stop)

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    assert listening.wait(HANGS_S)
    options = [("grpc.max_metadata_size", 64 << 10)]
    with grpc.insecure_channel(f"localhost:{ready.port}", options) as channel:
        yield SimpleNamespace(channel=channel, callers=callers, place=str(place))
    ready.loop.call_soon_threadsafe(ready.stop.set)
    thread.join(HANGS_S)
    assert not thread.is_alive()


edges = st.sampled_from([0, 1, -1, 2, 20, 63, 64, 65, 299, 300, 2**31 - 1, -(2**31)])
int32 = edges | st.integers(-(2**31), 2**31 - 1)
int64 = edges | st.sampled_from([2**63 - 1, -(2**63), 2**31]) | st.integers(-(2**63), 2**63 - 1)
doubles = st.sampled_from([0.0, 1.0, 0.5, -1.0, 1e-300, 1e300, 100.0, 5e-324]) | st.floats()
texts = st.sampled_from(["", "<s>", "</s>", "\x00", "\U0001f600" * 3, "a" * 70]) | st.text(max_size=40)
names = st.sampled_from(
    [
        "",
        "..",
        "../x",
        "acme/one@1",
        "/etc/passwd",
        "acme%2fone",
        "acme/../x",
        "acme/one\x00",
        "secret-place/x",
    ]
) | st.text(max_size=20)
# What fields usually hold, so that calls get further than the first check.
USUAL: dict[str, st.SearchStrategy[Any]] = {
    "adapter": st.sampled_from(["acme/one", "acme/one", "acme/broken", "acme/none", "other/x", ""]),
    "name": st.sampled_from(["acme/one", "acme/one", "acme/broken", "acme/none", "other/x"]),
    "version": st.just(1),
    "role": st.sampled_from(["user", "assistant", "system"]),
    "max_new_tokens": st.integers(1, 20),
    "temperature": st.sampled_from([0.0, 0.7, 5.0]),
    "top_p": st.floats(0.1, 1),
    "top_k": st.integers(0, 30),
    "min_p": st.floats(0, 1),
    "repetition_penalty": st.floats(0.5, 2),
    "seed": st.integers(0, 2**40),
    "stop_token_ids": st.integers(0, 257),
    "ids": st.integers(0, 257),
    "token_ids": st.integers(0, 257),
    "logprobs": st.integers(0, 20),
    "top_logprobs": st.integers(0, 20),
    "page_size": st.integers(1, 1000),
    "page_token": st.just(""),
    "in_use": st.integers(0, 3),
    "stop": st.text(min_size=1, max_size=4),
    "prompt": st.text(min_size=1, max_size=12),
    "text": st.text(min_size=1, max_size=12),
    "content": st.text(max_size=12),
}


@st.composite
def messages(draw, descriptor: Any, depth: int = 0) -> Any:
    """Any message of a type; each field is set or not, and names, roles and texts are often nearly right."""
    message = GetMessageClass(descriptor)()
    oneofs = {
        field.name: draw(st.sampled_from([other.name for other in field.containing_oneof.fields]))
        for field in descriptor.fields
        if field.containing_oneof is not None and len(field.containing_oneof.fields) > 1
    }
    for field in descriptor.fields:
        if oneofs.get(field.name, field.name) != field.name:
            continue
        if draw(st.integers(0, 9)) < (5 if field.has_presence and field.message_type is None else 1):
            continue
        values = values_of(field, depth)
        if field.is_repeated:
            getattr(message, field.name).extend(draw(st.lists(values, min_size=1, max_size=4)))
        elif field.message_type is not None:
            getattr(message, field.name).CopyFrom(draw(values))
        else:
            setattr(message, field.name, draw(values))
    return message


def values_of(field: Any, depth: int) -> st.SearchStrategy[Any]:
    if field.message_type is not None:
        return messages(field.message_type, depth + 1)
    kinds = {
        field.TYPE_STRING: texts,
        field.TYPE_INT32: int32,
        field.TYPE_INT64: int64,
        field.TYPE_DOUBLE: doubles,
        field.TYPE_BOOL: st.booleans(),
        field.TYPE_ENUM: int32,
    }
    wild = names if field.name in ("adapter", "name") else kinds[field.type]
    if field.name not in USUAL:
        return wild
    return st.integers(0, 24).flatmap(lambda number: wild if number == 0 else USUAL[field.name])


header_text = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=40)
metadata_pairs = st.tuples(
    st.sampled_from(["authorization", "x-request-id", "x-adapter", "traceparent", "x-other"]), header_text
) | st.tuples(st.sampled_from(["x-bin", "grpc-trace-bin"]), st.binary(max_size=40))


@st.composite
def calls(draw) -> tuple[str, bytes]:
    """A call and what is sent in it: a message, a damaged one, or anything."""
    rpc = draw(st.sampled_from(sorted(METHODS)))
    data = draw(messages(METHODS[rpc].input_type)).SerializeToString()
    if draw(st.integers(0, 7)) == 0:
        data = draw(st.binary(max_size=60))
    elif draw(st.integers(0, 7)) == 0 and data:
        cut = draw(st.integers(0, len(data)))
        data = data[:cut] + draw(st.binary(max_size=6)) + data[cut + draw(st.integers(0, 3)) :]
    return rpc, data


def attempt(server: Any, rpc: str, data: bytes, metadata: Any) -> Code:
    """Send it; the answer must be a documented one, and tell nothing of the inside."""
    method = METHODS[rpc]
    path = f"/{method.containing_service.full_name}/{rpc}"
    reply = GetMessageClass(method.output_type)
    try:
        if method.server_streaming:
            call = server.channel.unary_stream(path, response_deserializer=reply.FromString)
            *_, last = call(data, metadata=metadata, timeout=HANGS_S)
            assert last.HasField("completion")
        else:
            server.channel.unary_unary(path, response_deserializer=reply.FromString)(
                data, metadata=metadata, timeout=HANGS_S
            )
    except grpc.RpcError as error:
        failed = error
    else:
        return Code.OK
    status = rpc_status.from_call(failed)
    assert status is not None, failed
    assert failed.code() in DOCUMENTED, status
    # A text that came with the request may come back, so what leaks is looked for only beyond it.
    for leak in (*LEAKS, server.place):
        assert leak not in str(status) or leak in data.decode("latin-1"), status
    return failed.code()


def fuzz(server: Any, examples: int) -> None:
    seen: set[Code] = set()

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
    )
    @given(call=calls(), caller=st.integers(0, 5), pairs=st.lists(metadata_pairs, max_size=2))
    def send(call, caller, pairs):
        own = server.callers[caller if caller < 4 else 0]
        seen.add(attempt(server, *call, (*pairs, *own) if own is not None else tuple(pairs)))

    send()
    # It is no fuzz of the first check alone.
    assert seen >= {Code.OK, Code.INVALID_ARGUMENT, Code.NOT_FOUND, Code.UNAUTHENTICATED}
    works(server)


def works(server: Any) -> None:
    """The server answers as if nothing had happened."""
    request = inference_pb2.GenerateRequest(
        adapter="acme/one",
        input=common_pb2.Input(prompt="hello"),
        sampling=inference_pb2.SamplingParams(max_new_tokens=4, temperature=0),
    )
    assert attempt(server, "Generate", request.SerializeToString(), server.callers[0]) is Code.OK


def test_whatever_is_sent_a_documented_answer_comes(server):
    fuzz(server, 250)


@pytest.mark.slow
def test_whatever_is_sent_a_documented_answer_comes_at_length(server):
    fuzz(server, 6000)


def test_the_largest_message_and_metadata(server):
    long = inference_pb2.TokenizeRequest(input=common_pb2.Input(prompt="x" * (80 << 10)))
    with pytest.raises(grpc.RpcError) as caught:
        server.channel.unary_unary("/hotswap.v1.InferenceService/Tokenize")(
            long.SerializeToString(), metadata=server.callers[0], timeout=HANGS_S
        )
    assert caught.value.code() is Code.RESOURCE_EXHAUSTED
    nested = b"\x0a\xff\x7f" * 5000
    for rpc in METHODS:
        assert attempt(server, rpc, nested, server.callers[0]) in DOCUMENTED
    works(server)
