"""What goes into the engine and what comes back, time limits, cancellation, and stopping."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from hotswap.aliases import Target
from hotswap.v1 import adapters_pb2, common_pb2, inference_pb2
from hotswap_server.core import SamplingParams
from hotswap_server.errors import OverloadedError
from structlog.testing import capture_logs

SERVICES = ("hotswap.v1.InferenceService", "hotswap.v1.AdapterService")


def text(prompt: str = "hi") -> common_pb2.Input:
    return common_pb2.Input(prompt=prompt)


def stream_request(**fields) -> inference_pb2.GenerateStreamRequest:
    return inference_pb2.GenerateStreamRequest(input=text(), **fields)


async def test_generate_answers_text_tokens_and_how_it_ran(serving):
    async with serving() as s:
        ref = s.engine.adapters.add("acme/support", 3).ref
        reply = await s.inference.Generate(
            inference_pb2.GenerateRequest(
                adapter="acme/support", input=text(), sampling=inference_pb2.SamplingParams(logprobs=1)
            )
        )
        assert (reply.text, list(reply.token_ids)) == ("ABC", [65, 66, 67])
        assert [entry.logprob for entry in reply.logprobs] == [-0.5] * 3
        assert [(top.token_id, top.logprob) for top in reply.logprobs[0].top] == [(66, -1.5)]
        end = reply.completion
        assert (end.adapter.name, end.adapter.version) == ("acme/support", 3)
        assert (end.adapter.digest, end.adapter.method) == (ref.digest, "lora")
        assert end.path == common_pb2.SERVING_PATH_BATCHED
        assert end.finish_reason == inference_pb2.FINISH_REASON_LENGTH
        assert (end.usage.prompt_tokens, end.usage.generated_tokens) == (2, 3)
        spent = end.timings
        assert (spent.queue_seconds, spent.load_seconds) == (0.1, 0.2)
        assert (spent.prefill_seconds, spent.decode_seconds) == (0.3, 0.4)


async def test_a_stream_is_deltas_and_one_completion(serving):
    async with serving() as s:
        messages = [message async for message in s.inference.GenerateStream(stream_request())]
        assert [message.WhichOneof("event") for message in messages] == [*["delta"] * 3, "completion"]
        assert "".join(message.delta.text for message in messages) == "ABC"
        assert messages[-1].completion.adapter.method == "none"
        assert messages[-1].completion.path == common_pb2.SERVING_PATH_BASE


async def test_absent_sampling_fields_take_the_defaults_and_given_zeros_count(serving):
    async with serving() as s:
        await s.inference.Generate(inference_pb2.GenerateRequest(input=text()))
        assert s.engine.requests[-1].sampling == SamplingParams()
        given = {"max_new_tokens": 5, "temperature": 0.0, "top_p": 0.5, "top_k": 3, "min_p": 0.25}
        given |= {"repetition_penalty": 1.5, "seed": 0, "ignore_eos": True, "logprobs": 0}
        await s.inference.Generate(
            inference_pb2.GenerateRequest(
                input=text(),
                sampling=inference_pb2.SamplingParams(stop=["x", "y"], stop_token_ids=[1, 2], **given),
            )
        )
        expected = SamplingParams(stop=("x", "y"), stop_token_ids=(1, 2), **given)
        assert s.engine.requests[-1].sampling == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (text("héllo"), "héllo"),
        (text("long " * 2_000), "long " * 2_000),
        (common_pb2.Input(token_ids=common_pb2.TokenIds(ids=b"ids")), "ids"),
        (
            common_pb2.Input(
                messages=common_pb2.ChatMessages(
                    messages=[common_pb2.ChatMessage(role="user", content="hey")]
                )
            ),
            "user:hey|assistant:",
        ),
        (
            common_pb2.Input(
                messages=common_pb2.ChatMessages(
                    messages=[common_pb2.ChatMessage(role="user", content="hey")], add_generation_prompt=False
                )
            ),
            "user:hey",
        ),
    ],
    ids=["prompt", "long prompt", "token_ids", "messages", "messages without an opening"],
)
async def test_every_form_of_input_becomes_its_tokens(serving, given, expected):
    async with serving() as s:
        reply = await s.inference.Tokenize(inference_pb2.TokenizeRequest(input=given))
        assert bytes(reply.token_ids).decode() == expected
        assert reply.count == len(reply.token_ids)
        await s.inference.Generate(inference_pb2.GenerateRequest(input=given))
        assert bytes(s.engine.requests[-1].prompt_ids).decode() == expected


async def test_score_scores_the_text_after_the_context(serving):
    async with serving() as s:
        reply = await s.inference.Score(inference_pb2.ScoreRequest(text="abc", context=text("xy")))
        assert s.engine.requests[-1].prompt_ids == tuple(b"xyabc")
        assert [entry.token_id for entry in reply.logprobs] == list(b"abc")
        assert (reply.total_logprob, reply.usage.prompt_tokens) == (-3.0, 5)
        reply = await s.inference.Score(inference_pb2.ScoreRequest(text="abc", top_logprobs=4))
        assert [entry.token_id for entry in reply.logprobs] == list(b"bc")
        assert (s.engine.requests[-1].score_from, s.engine.requests[-1].top_logprobs) == (1, 4)


async def test_cancelling_a_stream_leaves_the_engine(serving):
    async with serving() as s:
        s.engine.num_tokens, s.engine.pause = 1000, 0.01
        call = s.inference.GenerateStream(stream_request())
        assert (await call.read()).delta.text == "A"
        call.cancel()
        await asyncio.wait_for(s.engine.ended_early.wait(), 5)
        assert s.engine.running == 0


@pytest.mark.parametrize("rpc", ["Generate", "GenerateStream"])
async def test_a_deadline_leaves_the_engine(serving, refusal_of, rpc):
    async with serving() as s:
        s.engine.num_tokens, s.engine.pause = 1, 60.0
        request = getattr(inference_pb2, f"{rpc}Request")(input=text())
        call = getattr(s.inference, rpc)(request, timeout=0.2)
        refusal = await refusal_of(call if rpc == "Generate" else call.read())
        assert refusal.code is grpc.StatusCode.DEADLINE_EXCEEDED
        await asyncio.wait_for(s.engine.ended_early.wait(), 5)
        await asyncio.wait_for(s.server._calls.wait_idle(), 5)
        assert s.engine.running == 0


async def test_an_error_that_finds_the_caller_gone_is_a_cancellation(serving):
    """gRPC raises InternalError from an abort if it has not yet told the handler that the call is over."""

    class Gone:
        invocation_metadata = staticmethod(tuple)
        set_trailing_metadata = staticmethod(lambda metadata: None)

        async def abort_with_status(self, status):
            raise grpc.aio.InternalError

    async with serving() as s:
        with pytest.raises(asyncio.CancelledError):
            async with s.server._calls._call("hotswap.v1.InferenceService/Generate", Gone(), b""):
                raise OverloadedError("there is no room")


@pytest.mark.parametrize("rpc", ["Generate", "GenerateStream"])
async def test_the_servers_own_limit_ends_calls_without_a_deadline(serving, refusal_of, rpc):
    async with serving(max_timeout=0.2) as s:
        s.engine.num_tokens, s.engine.pause = 1, 60.0
        call = getattr(s.inference, rpc)(getattr(inference_pb2, f"{rpc}Request")(input=text()))
        refusal = await refusal_of(call if rpc == "Generate" else call.read())
        assert refusal.code is grpc.StatusCode.DEADLINE_EXCEEDED
        assert refusal.details["ErrorInfo"].reason == "TIME_LIMIT"
        assert s.engine.running == 0


async def test_the_limit_also_ends_a_stream_that_nobody_reads(serving):
    async with serving(max_timeout=1.0) as s:
        s.engine.num_tokens = 10_000_000
        call = s.inference.GenerateStream(stream_request())
        await s.engine.started.wait()
        await asyncio.wait_for(s.engine.ended_early.wait(), 10)
        call.cancel()


async def test_request_ids_come_back_and_logs_hold_no_content(serving):
    async with serving() as s:
        s.engine.adapters.add("acme/support")
        with capture_logs() as logs:
            call = s.inference.Generate(
                inference_pb2.GenerateRequest(adapter="acme/support", input=text("a secret")),
                metadata=(("x-request-id", "mine-1"),),
            )
            await call
            trailers = dict(await call.trailing_metadata())
            await s.server._calls.wait_idle()
        assert trailers["x-request-id"] == "mine-1"
        (entry,) = [entry for entry in logs if entry["event"] == "call"]
        assert entry["request_id"] == "mine-1"
        assert (entry["rpc"], entry["code"], entry["method"]) == ("Generate", "OK", "lora")
        assert (entry["adapter"], entry["version"], entry["path"]) == ("acme/support", 1, "batched")
        assert (entry["prompt_tokens"], entry["generated_tokens"]) == (8, 3)
        assert "secret" not in str(logs)
        assert "ABC" not in str(logs)


async def test_a_malformed_request_id_is_replaced(serving):
    async with serving() as s:
        call = s.inference.Tokenize(
            inference_pb2.TokenizeRequest(input=text()), metadata=(("x-request-id", "a b/c"),)
        )
        await call
        assert len(dict(await call.trailing_metadata())["x-request-id"]) == 32


async def test_health_is_told_per_service_and_ends_with_the_server(serving, refusal_of):
    serving_now = health_pb2.HealthCheckResponse.SERVING
    async with serving() as s:
        stub = health_pb2_grpc.HealthStub(s.channel)
        for service in ("", *SERVICES):
            reply = await stub.Check(health_pb2.HealthCheckRequest(service=service))
            assert reply.status == serving_now
        refusal = await refusal_of(stub.Check(health_pb2.HealthCheckRequest(service="nobody")))
        assert refusal.code is grpc.StatusCode.NOT_FOUND
        watch = stub.Watch(health_pb2.HealthCheckRequest(service=SERVICES[0]))
        assert (await watch.read()).status == serving_now
        s.engine.num_tokens, s.engine.pause = 30, 0.01
        running = s.inference.Generate(inference_pb2.GenerateRequest(input=text()))
        await s.engine.started.wait()
        stopping = asyncio.create_task(s.server.stop(10))
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert len((await running).token_ids) == 30
        await stopping


async def test_reflection_lists_the_services_unless_switched_off(serving, refusal_of):
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    async with serving() as s:
        call = reflection_pb2_grpc.ServerReflectionStub(s.channel).ServerReflectionInfo(iter([request]))
        reply = await call.read()
        names = {service.name for service in reply.list_services_response.service}
        assert names >= {*SERVICES, "grpc.health.v1.Health"}
    async with serving(reflect=False) as s:
        call = reflection_pb2_grpc.ServerReflectionStub(s.channel).ServerReflectionInfo(iter([request]))
        assert (await refusal_of(call.read())).code is grpc.StatusCode.UNIMPLEMENTED


async def test_a_stop_lets_a_stream_finish_and_refuses_new_requests(serving, refusal_of):
    async with serving() as s:
        s.engine.num_tokens, s.engine.pause = 50, 0.01
        stream = aiter(s.inference.GenerateStream(stream_request()))
        await anext(stream)
        stopping = asyncio.create_task(s.server.stop(10))
        while not s.engine.draining:
            await asyncio.sleep(0.01)
        refusal = await refusal_of(s.inference.Generate(inference_pb2.GenerateRequest(input=text())))
        assert refusal.code is grpc.StatusCode.UNAVAILABLE
        rest = [message async for message in stream]
        assert len(rest) == 50
        assert rest[-1].HasField("completion")
        await asyncio.wait_for(stopping, 5)


async def test_a_stop_fails_what_does_not_finish_in_time(serving, refusal_of):
    async with serving() as s:
        s.engine.num_tokens, s.engine.pause = 1, 60.0
        call = s.inference.Generate(inference_pb2.GenerateRequest(input=text()))
        await s.engine.started.wait()
        stopping = asyncio.create_task(s.server.stop(0.2))
        refusal = await refusal_of(call)
        assert refusal.code is grpc.StatusCode.UNAVAILABLE
        assert refusal.details["ErrorInfo"].reason == "DRAINING"
        await asyncio.wait_for(stopping, 5)
        assert s.engine.running == 0


@pytest.mark.parametrize(
    ("adapter", "version", "expected"),
    [
        ("acme/support", None, 3),
        ("acme/support", 2, 2),
        ("acme/support@2", None, 2),
        ("acme/support@stable", None, 1),
    ],
)
async def test_an_adapter_is_named_with_its_version_or_alias(serving, adapter, version, expected):
    async with serving() as s:
        for number in (1, 2, 3):
            s.engine.adapters.add("acme/support", number)
        s.engine.adapters.aliases["acme/support@stable"] = Target(1)
        wanted = {"adapter": adapter, "version": version}
        reply = await s.inference.Generate(inference_pb2.GenerateRequest(input=text(), **wanted))
        assert reply.completion.adapter.version == expected
        assert reply.completion.adapter.name == "acme/support"
        scored = await s.inference.Score(inference_pb2.ScoreRequest(text="abc", **wanted))
        assert scored.adapter.version == expected
        shown = await s.admin.GetAdapter(adapters_pb2.GetAdapterRequest(name=adapter, version=version))
        assert shown.adapter.version == expected


async def test_a_routing_key_fixes_the_choice_of_a_canary(serving):
    async with serving() as s:
        for number in (1, 2):
            s.engine.adapters.add("acme/support", number)
        target = s.engine.adapters.aliases["acme/support@stable"] = Target(1, 2, 40)

        async def version(**options):
            request = inference_pb2.GenerateRequest(input=text(), adapter="acme/support@stable", **options)
            return (await s.inference.Generate(request)).completion.adapter.version

        keys = [f"user-{i}" for i in range(12)]
        assert [await version(routing_key=key) for key in keys] == [
            target.choose(key, "acme/support@stable") for key in keys
        ]
        assert {await version() for _ in range(60)} == {1, 2}, "without a key each request chooses"
        shown = await s.admin.GetAdapter(adapters_pb2.GetAdapterRequest(name="acme/support@stable"))
        assert shown.adapter.version == 1, "never the canary"


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (inference_pb2.GenerateRequest(adapter="acme/support@2", version=2), "version"),
        (inference_pb2.GenerateRequest(adapter="acme/support@stable", version=2), "version"),
        (inference_pb2.GenerateRequest(adapter="acme/support@Stable"), "adapter"),
        (inference_pb2.GenerateRequest(adapter="acme/support@"), "adapter"),
        (inference_pb2.GenerateRequest(adapter="@stable"), "adapter"),
        (inference_pb2.GenerateRequest(routing_key="k" * 257), "routing_key"),
    ],
)
async def test_a_reference_that_makes_no_sense_is_refused(serving, refusal_of, request_, field):
    async with serving() as s:
        request_.input.CopyFrom(text())
        refusal = await refusal_of(s.inference.Generate(request_))
        assert refusal.code is grpc.StatusCode.INVALID_ARGUMENT
        assert refusal.details["BadRequest"].field_violations[0].field == field
