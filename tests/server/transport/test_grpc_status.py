"""Every error reaches the caller as its status, with details."""

from __future__ import annotations

import asyncio
import math
import threading

import grpc
import pytest
from hotswap.v1 import adapters_pb2, common_pb2, inference_pb2
from hotswap_server import errors
from hotswap_server.grpc.status import TimeLimitError, status_of
from structlog.testing import capture_logs

Code = grpc.StatusCode


def text(prompt: str = "hi") -> common_pb2.Input:
    return common_pb2.Input(prompt=prompt)


@pytest.mark.parametrize(
    ("error", "code", "reason", "retry"),
    [
        (errors.AdapterNotFoundError("no", adapter="a/b"), Code.NOT_FOUND, "ADAPTER_NOT_FOUND", False),
        (errors.AdapterInvalidError("no"), Code.FAILED_PRECONDITION, "ADAPTER_INVALID", False),
        (errors.AdapterQuarantinedError("no"), Code.FAILED_PRECONDITION, "ADAPTER_QUARANTINED", False),
        (errors.AdapterInUseError("no"), Code.FAILED_PRECONDITION, "ADAPTER_IN_USE", False),
        (errors.AdapterUnloadedError("no"), Code.CANCELLED, errors.AdapterUnloadedError.reason, False),
        (errors.AdapterDamagedError("no"), Code.FAILED_PRECONDITION, "ADAPTER_DAMAGED", False),
        (errors.StoreUnavailableError("no"), Code.UNAVAILABLE, "STORE_UNAVAILABLE", True),
        (errors.StoreDeniedError("no"), Code.FAILED_PRECONDITION, "STORE_DENIED", False),
        (errors.CapacityError("no"), Code.RESOURCE_EXHAUSTED, "CAPACITY_EXCEEDED", False),
        (errors.OverloadedError("no"), Code.RESOURCE_EXHAUSTED, "OVERLOADED", True),
        (errors.DeadlineTooShortError("no"), Code.DEADLINE_EXCEEDED, "DEADLINE_TOO_SHORT", False),
        (errors.DrainingError("no"), Code.UNAVAILABLE, "DRAINING", True),
        (errors.EngineError("no"), Code.INTERNAL, "ENGINE_FAILED", False),
    ],
)
@pytest.mark.parametrize("rpc", ["Generate", "GenerateStream", "Score"])
async def test_an_engine_error_has_its_code_and_details(serving, refusal_of, error, code, reason, retry, rpc):
    async with serving() as s:
        s.engine.error = error
        if rpc == "Score":
            call = s.inference.Score(inference_pb2.ScoreRequest(text="abc"))
        elif rpc == "Generate":
            call = s.inference.Generate(inference_pb2.GenerateRequest(input=text()))
        else:
            call = s.inference.GenerateStream(inference_pb2.GenerateStreamRequest(input=text())).read()
        refusal = await refusal_of(call)
        assert (refusal.code, refusal.message) == (code, "no")
        info = refusal.details["ErrorInfo"]
        assert (info.domain, info.reason, dict(info.metadata)) == ("hotswap", reason, error.metadata)
        assert ("RetryInfo" in refusal.details) is retry
    # A call is counted after its answer has left, so only a stopped server has counted it for certain.
    assert s.sample("hotswap_requests_total", rpc=rpc, method="base", code=code.name) == 1
    assert s.engine.running == 0


def test_every_error_of_the_server_has_a_code_of_its_own():
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    kinds = [k for k in kinds if issubclass(k, errors.HotswapError) and k is not errors.HotswapError]
    for kind in [*kinds, TimeLimitError]:
        error = kind("field", "no") if kind is errors.InvalidRequestError else kind("no")
        expected_internal = kind in (errors.EngineError, errors.BaseModelError)
        assert (status_of(error).code is Code.INTERNAL) is expected_internal, kind


async def test_an_unexpected_error_tells_an_id_and_no_more(serving, refusal_of):
    async with serving() as s:
        s.engine.error = RuntimeError("secret prompt")
        with capture_logs() as logs:
            refusal = await refusal_of(s.inference.Generate(inference_pb2.GenerateRequest(input=text())))
        assert refusal.code is Code.INTERNAL
        assert "secret" not in refusal.message
        error_id = refusal.details["ErrorInfo"].metadata["error_id"]
        assert error_id in refusal.message
        assert error_id in [entry.get("error_id") for entry in logs]


async def test_an_error_in_the_middle_of_a_stream_comes_after_its_deltas(serving, refusal_of):
    async with serving() as s:
        s.engine.error, s.engine.error_after = errors.EngineError("no"), 2
        call = s.inference.GenerateStream(inference_pb2.GenerateStreamRequest(input=text()))
        assert [(await call.read()).delta.text for _ in range(2)] == ["A", "B"]
        assert (await refusal_of(call.read())).code is Code.INTERNAL


async def test_long_messages_still_fit_into_headers(serving, refusal_of):
    async with serving() as s:
        s.engine.error = errors.AdapterInvalidError("é" * 100_000, tensor="é" * 100_000)
        refusal = await refusal_of(s.inference.Generate(inference_pb2.GenerateRequest(input=text())))
        assert refusal.code is Code.FAILED_PRECONDITION
        assert refusal.message.startswith("ééé")
        assert refusal.details["ErrorInfo"].reason == "ADAPTER_INVALID"


SAMPLING = [
    ({"temperature": -1.0}, "sampling.temperature"),
    ({"temperature": math.nan}, "sampling.temperature"),
    ({"temperature": math.inf}, "sampling.temperature"),
    ({"top_p": 0.0}, "sampling.top_p"),
    ({"top_p": math.nan}, "sampling.top_p"),
    ({"top_k": -1}, "sampling.top_k"),
    ({"min_p": 1.5}, "sampling.min_p"),
    ({"repetition_penalty": 0.0}, "sampling.repetition_penalty"),
    ({"seed": -1}, "sampling.seed"),
    ({"max_new_tokens": 0}, "sampling.max_new_tokens"),
    ({"stop": [""]}, "sampling.stop"),
    ({"stop_token_ids": [5, 300]}, "sampling.stop_token_ids[1]"),
    ({"logprobs": 21}, "sampling.logprobs"),
]


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        *(
            (
                inference_pb2.GenerateRequest(input=text(), sampling=inference_pb2.SamplingParams(**given)),
                field,
            )
            for given, field in SAMPLING
        ),
        (inference_pb2.GenerateRequest(), "input"),
        (inference_pb2.GenerateRequest(input=common_pb2.Input()), "input"),
        (inference_pb2.GenerateRequest(input=text("")), "input.prompt"),
        (
            inference_pb2.GenerateRequest(input=common_pb2.Input(token_ids=common_pb2.TokenIds())),
            "input.token_ids",
        ),
        (
            inference_pb2.GenerateRequest(input=common_pb2.Input(token_ids=common_pb2.TokenIds(ids=[1, -1]))),
            "input.token_ids[1]",
        ),
        (
            inference_pb2.GenerateRequest(input=common_pb2.Input(token_ids=common_pb2.TokenIds(ids=[300]))),
            "input.token_ids[0]",
        ),
        (
            inference_pb2.GenerateRequest(input=common_pb2.Input(messages=common_pb2.ChatMessages())),
            "input.messages",
        ),
        (
            inference_pb2.GenerateRequest(
                input=common_pb2.Input(
                    messages=common_pb2.ChatMessages(messages=[common_pb2.ChatMessage(content="x")])
                )
            ),
            "input.messages[0].role",
        ),
        (inference_pb2.GenerateRequest(input=text(), adapter="nobody"), "adapter"),
        (inference_pb2.GenerateRequest(input=text(), adapter="../etc/passwd"), "adapter"),
        (inference_pb2.GenerateRequest(input=text(), adapter="a/b", version=0), "version"),
        (inference_pb2.GenerateRequest(input=text(), adapter="a/b", version=2**40), "version"),
        (inference_pb2.GenerateRequest(input=text(), version=1), "version"),
        (inference_pb2.ScoreRequest(), "target"),
        (inference_pb2.ScoreRequest(text="abc", context=common_pb2.Input()), "context"),
        (inference_pb2.ScoreRequest(text="abc", context=text("")), "context.prompt"),
        (inference_pb2.ScoreRequest(text=""), "text"),
        (inference_pb2.ScoreRequest(text="abc", top_logprobs=-1), "top_logprobs"),
        (inference_pb2.ScoreRequest(token_ids=common_pb2.TokenIds(ids=[999])), "token_ids[0]"),
        (inference_pb2.TokenizeRequest(), "input"),
        (adapters_pb2.GetAdapterRequest(), "name"),
        (adapters_pb2.GetAdapterRequest(name="a/b", version=-3), "version"),
        (adapters_pb2.LoadAdapterRequest(name="a/b/c"), "name"),
        (adapters_pb2.UnloadAdapterRequest(name="a"), "name"),
        (adapters_pb2.UnloadAdapterRequest(name="a/b", in_use=9), "in_use"),
        (adapters_pb2.ListAdaptersRequest(page_size=0), "page_size"),
        (adapters_pb2.ListAdaptersRequest(page_size=1001), "page_size"),
        (adapters_pb2.ListAdaptersRequest(page_token="?"), "page_token"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_a_wrong_field_is_named(serving, refusal_of, request_, field):
    async with serving() as s:
        rpc = type(request_).__name__.removesuffix("Request")
        stub = s.admin if "Adapter" in rpc else s.inference
        refusal = await refusal_of(getattr(stub, rpc)(request_))
        assert refusal.code is Code.INVALID_ARGUMENT
        assert refusal.details["ErrorInfo"].reason == "INVALID_REQUEST"
        (violation,) = refusal.details["BadRequest"].field_violations
        assert violation.field == field
        assert violation.description
        assert s.engine.requests == []


async def test_a_base_without_a_chat_template_refuses_messages(serving, refusal_of):
    async with serving() as s:
        s.engine.tokenizer.chat_template = None
        turns = common_pb2.ChatMessages(messages=[common_pb2.ChatMessage(role="user", content="x")])
        refusal = await refusal_of(
            s.inference.Tokenize(inference_pb2.TokenizeRequest(input=common_pb2.Input(messages=turns)))
        )
        assert refusal.code is Code.INVALID_ARGUMENT
        assert refusal.details["BadRequest"].field_violations[0].field == "input.messages"


async def test_an_unknown_adapter_is_not_found(serving, refusal_of):
    async with serving() as s:
        refusal = await refusal_of(
            s.inference.Generate(inference_pb2.GenerateRequest(input=text(), adapter="acme/none"))
        )
        assert refusal.code is Code.NOT_FOUND
        assert refusal.details["ErrorInfo"].metadata["adapter"] == "acme/none"
    assert s.sample("hotswap_requests_total", rpc="Generate", method="unknown", code="NOT_FOUND") == 1


async def test_a_store_that_hangs_is_unavailable_and_the_base_goes_on(serving, refusal_of):
    async with serving(store_timeout=0.2) as s:
        answer = threading.Event()
        s.engine.adapters.resolve = lambda name, version, key: answer.wait(30)
        try:
            waiting = [
                s.inference.Generate(inference_pb2.GenerateRequest(input=text(), adapter="a/b"))
                for _ in range(40)
            ]
            assert (await s.inference.Generate(inference_pb2.GenerateRequest(input=text()))).text == "ABC"
            refusals = await asyncio.gather(*(refusal_of(call) for call in waiting))
        finally:
            answer.set()
        assert {refusal.code for refusal in refusals} == {Code.UNAVAILABLE}
        assert {refusal.details["ErrorInfo"].reason for refusal in refusals} == {"STORE_UNAVAILABLE"}


async def test_a_message_over_the_limit_is_resource_exhausted_and_the_server_goes_on(serving, refusal_of):
    async with serving(max_message_bytes=10_000) as s:
        big = inference_pb2.GenerateRequest(input=text("x" * 20_000))
        assert (await refusal_of(s.inference.Generate(big))).code is Code.RESOURCE_EXHAUSTED
        small = inference_pb2.GenerateRequest(input=text("x" * 5_000))
        assert (await s.inference.Generate(small)).text == "ABC"
