"""Streaming: deltas, the result at the end, stopping early, and what is retried."""

import asyncio

import grpc
import pytest
from hotswap.v1 import inference_pb2
from hotswap_client import (
    AsyncClient,
    Client,
    DeadlineExceeded,
    Internal,
    ServingPath,
    Unavailable,
)

from .conftest import COMPLETION, endless, fail

DELTA = inference_pb2.GenerateStreamResponse(delta=inference_pb2.Delta(text="x", token_ids=[1]))


def test_sync_stream_ends_with_the_result(fake):
    with Client(fake.target) as client:
        stream = client.stream(adapter="acme/support", prompt="x", temperature=0)
        assert stream.result is None
        deltas = list(stream)
        whole = client.generate(prompt="x")
    assert [(delta.text, delta.token_ids) for delta in deltas] == [("hi", (7,)), ("!", (8, 2)), ("", ())]
    assert [delta.result is None for delta in deltas] == [True, True, False]
    assert stream.result is deltas[-1].result
    assert stream.result == whole
    assert stream.result.path is ServingPath.BATCHED
    assert fake.requests[0].adapter == "acme/support"
    assert fake.metadata[0]["x-adapter"] == "acme/support"


async def test_async_stream_ends_with_the_result(fake):
    async with AsyncClient(fake.target) as client:
        stream = client.stream(prompt="x")
        deltas = [delta async for delta in stream]
        whole = await client.generate(prompt="x")
    assert "".join(delta.text for delta in deltas) == "hi!"
    assert stream.result is deltas[-1].result
    assert stream.result == whole


def test_breaking_out_of_a_sync_stream_cancels_the_call(fake):
    fake.scripts["GenerateStream"] = endless
    with Client(fake.target) as client:
        for delta in client.stream(prompt="x"):
            assert delta.text == "x"
            break
        assert fake.ended.wait(5)


def test_leaving_a_sync_stream_cancels_the_call(fake):
    fake.scripts["GenerateStream"] = endless
    with Client(fake.target) as client:
        with client.stream(prompt="x") as stream:
            next(stream)
        assert fake.ended.wait(5)
        assert stream.result is None


async def test_breaking_out_of_an_async_stream_cancels_the_call(fake):
    fake.scripts["GenerateStream"] = endless
    async with AsyncClient(fake.target) as client:
        async for delta in client.stream(prompt="x"):
            assert delta.text == "x"
            break
        assert await asyncio.to_thread(fake.ended.wait, 5)


async def test_a_cancelled_task_cancels_the_call(fake):
    fake.scripts["GenerateStream"] = endless
    started = asyncio.Event()

    async def consume(client):
        async for _ in client.stream(prompt="x"):
            started.set()

    async with AsyncClient(fake.target) as client:
        task = asyncio.create_task(consume(client))
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(fake.ended.wait, 5)


def test_a_stream_without_its_end_is_an_error(fake):
    fake.scripts["GenerateStream"] = lambda *_: iter([DELTA])
    with Client(fake.target) as client, pytest.raises(Internal, match="without saying"):
        list(client.stream(prompt="x"))


@pytest.mark.parametrize("own", [True, False])
def test_timeout_of_a_call_replaces_the_clients(fake, own):
    fake.scripts["GenerateStream"] = endless
    with Client(fake.target, timeout=60 if own else 0.2) as client, pytest.raises(DeadlineExceeded):
        list(client.stream(prompt="x", **({"timeout": 0.2} if own else {})))


def flaky(failures, before=()):
    """Fails with UNAVAILABLE that many times, after the messages of `before`."""
    attempts = []

    def script(request, context):
        attempts.append(request)
        yield from before
        if len(attempts) <= failures:
            fail(grpc.StatusCode.UNAVAILABLE, "draining")(request, context)
        yield inference_pb2.GenerateStreamResponse(completion=COMPLETION)

    script.attempts = attempts
    return script


def test_unavailable_before_the_first_message_is_retried(fake):
    fake.scripts["GenerateStream"] = script = flaky(2)
    with Client(fake.target) as client:
        assert list(client.stream(prompt="x"))[-1].result is not None
    assert len(script.attempts) == 3


def test_unavailable_after_the_first_message_is_not_retried(fake):
    fake.scripts["GenerateStream"] = script = flaky(2, [DELTA])
    with Client(fake.target) as client:
        stream = client.stream(prompt="x")
        assert next(stream).text == "x"
        with pytest.raises(Unavailable, match="draining"):
            next(stream)
    assert len(script.attempts) == 1


async def test_the_async_client_retries_too(fake):
    fake.scripts["GenerateStream"] = script = flaky(1)
    async with AsyncClient(fake.target) as client:
        assert [delta async for delta in client.stream(prompt="x")][-1].result is not None
    assert len(script.attempts) == 2


def test_retries_can_be_switched_off(fake):
    fake.scripts["GenerateStream"] = script = flaky(1)
    with Client(fake.target, retries=0) as client, pytest.raises(Unavailable):
        list(client.stream(prompt="x"))
    assert len(script.attempts) == 1


def test_large_messages_pass(fake):
    with Client(fake.target) as client:
        text = "x" * 6 * 2**20
        fake.scripts["Generate"] = lambda *_: inference_pb2.GenerateResponse(text=text)
        assert client.generate(prompt="x").text == text
