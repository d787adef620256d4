"""What stands in Ray's gRPC proxy, on Ray's own server class with handlers that answer by script."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import Any
from unittest.mock import Mock

import grpc
import pytest
from hotswap.v1 import adapters_pb2, adapters_pb2_grpc, inference_pb2, inference_pb2_grpc

pytest.importorskip("ray")
from hotswap_server.ray_serve import edge
from ray.serve._private.grpc_util import gRPCGenericServer
from ray.serve._private.proxy_request_response import gRPCProxyRequest


class Proxy:
    """Stands for Ray's proxy: reads a call as it does, and answers with `messages` and `status`."""

    def __init__(self) -> None:
        self.calls: list[gRPCProxyRequest] = []
        self.messages: list[bytes] = []
        self.code = grpc.StatusCode.OK

    def handlers(self, service_method: str, streaming_type: Any) -> Any:
        async def stream(request: Any, context: Any):
            self._answer(request, context, service_method)
            for message in self.messages:
                yield message

        async def unary(request: Any, context: Any) -> bytes:
            self._answer(request, context, service_method)
            return self.messages[0]

        return stream if streaming_type.value == "unary_stream" else unary

    def _answer(self, request: Any, context: Any, service_method: str) -> None:
        self.calls.append(gRPCProxyRequest(request, context, service_method, stream=False))
        context.set_trailing_metadata((("x-request-id", "7"),))
        context.set_code(self.code)


@asynccontextmanager
async def serving(proxy: Proxy):
    server = gRPCGenericServer(proxy.handlers)
    for add in (edge.add_inference_service, edge.add_adapter_service, edge.add_health):
        add(Mock(), server)  # as Ray does
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield (
                inference_pb2_grpc.InferenceServiceStub(channel),
                adapters_pb2_grpc.AdapterServiceStub(channel),
            )
    finally:
        await server.stop(None)


@pytest.fixture
def proxy() -> Proxy:
    proxy = Proxy()
    proxy.messages = [inference_pb2.GenerateResponse(text="hi").SerializeToString()]
    return proxy


@pytest.mark.parametrize(
    ("adapter", "model_id"),
    [
        ("acme/a", "acme/a"),
        ("acme/a@3", "acme/a"),
        ("acme/a@stable", "acme/a"),
        ("", None),
        ("x" * 300, None),
    ],
)
async def test_ray_is_told_the_adapter(proxy, adapter, model_id):
    async with serving(proxy) as (inference, _):
        reply = await inference.Generate(inference_pb2.GenerateRequest(adapter=adapter))
    assert reply.text == "hi"
    metadata = dict(proxy.calls[0].ray_serve_grpc_context.invocation_metadata())
    assert metadata.get(edge.MODEL_ID_KEY) == model_id
    assert edge.TIMEOUT_KEY not in metadata
    if model_id:
        assert proxy.calls[0].multiplexed_model_id == model_id


async def test_what_is_asked_about_an_adapter_goes_where_it_is(proxy):
    proxy.messages = [adapters_pb2.PinAdapterResponse().SerializeToString()]
    async with serving(proxy) as (_, adapters):
        await adapters.PinAdapter(adapters_pb2.PinAdapterRequest(name="acme/a"))
        await adapters.ListAdapters(adapters_pb2.ListAdaptersRequest())
    assert proxy.calls[0].multiplexed_model_id == "acme/a"
    assert edge.MODEL_ID_KEY not in dict(proxy.calls[1].ray_serve_grpc_context.invocation_metadata())


async def test_the_callers_own_keys_are_replaced_and_the_deadline_is_told(proxy):
    own = ((edge.MODEL_ID_KEY, "theirs"), (edge.TIMEOUT_KEY, "9999"), ("x-request-id", "7"))
    async with serving(proxy) as (inference, _):
        await inference.Generate(inference_pb2.GenerateRequest(adapter="acme/a"), metadata=own, timeout=30)
    metadata = proxy.calls[0].ray_serve_grpc_context.invocation_metadata()
    assert [value for key, value in metadata if key == edge.MODEL_ID_KEY] == ["acme/a"]
    [seconds] = [float(value) for key, value in metadata if key == edge.TIMEOUT_KEY]
    assert 0 < seconds <= 30.1  # gRPC sends it in tenths of a second, rounded up
    assert dict(metadata)["x-request-id"] == "7"


async def test_an_empty_message_is_kept_and_its_status_goes_on(proxy):
    whole = inference_pb2.GenerateStreamResponse(delta={"text": "a"}).SerializeToString()
    proxy.messages, proxy.code = [whole, b""], grpc.StatusCode.NOT_FOUND
    async with serving(proxy) as (inference, _):
        call = inference.GenerateStream(inference_pb2.GenerateStreamRequest())
        assert (await call.read()).delta.text == "a"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert dict(caught.value.trailing_metadata())["x-request-id"] == "7"
