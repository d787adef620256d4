"""Limits of what is in flight, and what a caller learns of the load."""

from __future__ import annotations

import asyncio
import time

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hotswap.v1 import adapters_pb2, common_pb2, inference_pb2
from hotswap_server.errors import DeadlineTooShortError, OverloadedError

Code = grpc.StatusCode


def request(prompt: str = "hi") -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(input=common_pb2.Input(prompt=prompt))


async def test_calls_over_the_limit_are_refused_and_operators_are_let_in(serving, refusal_of):
    async with serving(max_calls=2) as s:
        s.engine.adapters.add("acme/x")
        s.engine.pause = 0.05
        s.engine.num_tokens = 1000
        streams = [s.inference.Generate(request()) for _ in range(2)]
        while s.engine.running < 2:
            await s.engine.started.wait()
            s.engine.started.clear()
        refusal = await refusal_of(s.inference.Generate(request()))
        assert (refusal.code, refusal.details["ErrorInfo"].reason) == (Code.RESOURCE_EXHAUSTED, "OVERLOADED")
        assert "2 calls are being answered already" in refusal.message
        assert "RetryInfo" in refusal.details
        assert (await s.admin.GetAdapter(adapters_pb2.GetAdapterRequest(name="acme/x"))).adapter.version == 1
        for stream in streams:
            stream.cancel()
        await s.engine.ended_early.wait()
        s.engine.num_tokens, s.engine.pause = 1, 0.0
        while s.engine.running:
            await s.inference.Tokenize(inference_pb2.TokenizeRequest(input=common_pb2.Input(prompt="x")))
        assert (await s.inference.Generate(request())).text == "A"


async def test_bytes_over_the_limit_are_refused_but_one_request_alone_is_not(serving, refusal_of):
    async with serving(max_inflight_bytes=3000) as s:
        assert (await s.inference.Generate(request("x" * 4000))).text == "ABC"
        s.engine.pause = 30.0
        s.engine.started.clear()
        first = s.inference.Generate(request("x" * 2000))
        await s.engine.started.wait()
        refusal = await refusal_of(s.inference.Generate(request("x" * 2000)))
        assert refusal.code is Code.RESOURCE_EXHAUSTED
        assert "the requests that are being answered take" in refusal.message
        first.cancel()


async def test_the_delay_of_a_full_queue_reaches_the_caller(serving, refusal_of):
    async with serving() as s:
        s.engine.error = OverloadedError("full", retry_after=7.25)
        refusal = await refusal_of(s.inference.Generate(request()))
        assert refusal.details["RetryInfo"].retry_delay.ToTimedelta().total_seconds() == 7.25


async def test_a_deadline_that_is_too_short_is_told_as_one(serving, refusal_of):
    async with serving() as s:
        s.engine.error = DeadlineTooShortError("no")
        refusal = await refusal_of(s.inference.Generate(request()))
        assert refusal.code is Code.DEADLINE_EXCEEDED
        assert refusal.details["ErrorInfo"].reason == "DEADLINE_TOO_SHORT"


@pytest.mark.parametrize("timeout", [None, 50.0])
async def test_the_engine_learns_the_deadline_of_a_call_and_who_asks(serving, timeout):
    async with serving() as s:
        await s.inference.Generate(request(), timeout=timeout)
        await s.inference.Score(inference_pb2.ScoreRequest(text="abc"), timeout=timeout)
        for seen in s.engine.requests:
            assert seen.tenant == "anonymous"
            if timeout is None:
                assert seen.deadline is None
            else:
                assert 0 < seen.deadline - time.perf_counter() <= timeout + 1, "gRPC rounds it up"


async def test_health_follows_the_engine_and_operators_can_still_act(serving):
    check = health_pb2.HealthCheckRequest
    answer = health_pb2.HealthCheckResponse
    async with serving() as s:
        health = health_pb2_grpc.HealthStub(s.channel)

        async def statuses() -> list[int]:
            names = ("", "hotswap.v1.InferenceService", "hotswap.v1.AdapterService")
            return [(await health.Check(check(service=name))).status for name in names]

        for sound in (False, True, False):
            s.engine.on_health(sound)
            await asyncio.sleep(0)
            expected = answer.SERVING if sound else answer.NOT_SERVING
            assert await statuses() == [expected, expected, answer.SERVING]
