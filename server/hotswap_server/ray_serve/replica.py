"""A replica in Ray Serve: the whole server on a loopback port, and a relay from Ray's calls to it.

Everything that a call meets at the plain server it meets here too: access rules, limits, errors, traces.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, Final

import grpc
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2
from hotswap.v1 import adapters_pb2, inference_pb2
from ray import serve

from hotswap_server.config import ServeSettings, SettingsError, load_settings
from hotswap_server.ray_serve.edge import MODEL_ID_KEY, TIMEOUT_KEY

_LOOPBACK: Final = {"host": "127.0.0.1", "port": 0}
_NOT_HERE: Final = {
    "host": "Ray's proxy listens; see grpc_options",
    "port": "Ray's proxy listens; see grpc_options",
    "admin_port": "Ray's proxy listens; leave add_adapter_service out of grpc_servicer_functions instead",
    "health_port": "Ray's proxy listens; see add_health",
    "reflection": "Ray's proxy answers it; see grpc_options",
    "max_connection_age": "callers' connections end at Ray's proxy",
    "tls_cert": "Ray's proxy has no TLS; end it in a proxy before it",
    "tls_client_ca": "Ray's proxy sees no certificates; check them in a proxy before it",
}
# What the proxy says to us, and what gRPC says itself.
_NOT_RELAYED: Final = frozenset(
    {MODEL_ID_KEY, TIMEOUT_KEY, "application", "request_id", "session_id", "user-agent", "te", "content-type"}
)
_UNLIMITED: Final = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]


def application(args: dict[str, Any]) -> Any:
    """The application, for `import_path`. `args` are settings as a --config file has them.

    Raises:
        SettingsError: a setting is wrong, or has no meaning behind Ray's proxy.
    """
    settings = load_settings(**{"metrics_port": 0, **args})
    for name, reason in _NOT_HERE.items():
        if getattr(settings, name) != ServeSettings.model_fields[name].default:
            raise SettingsError(f"{name}: has no effect in Ray Serve: {reason}")
    settings = settings.model_copy(update=_LOOPBACK)
    hold = serve.multiplexed(max_num_models_per_replica=settings.adapter_slots)(Replica.hold)
    replica = type("Replica", (Replica,), {"hold": hold, "__del__": Replica.close})
    deployment = serve.deployment(
        replica,
        name="hotswap",
        max_ongoing_requests=2 * settings.max_batch_size,
        graceful_shutdown_timeout_s=settings.drain_timeout,
    )
    return deployment.bind(settings)


class Replica:
    """Ray calls the methods that a proxy's call names; `_relay` adds one for each of the services'."""

    async def __init__(self, settings: ServeSettings) -> None:  # type: ignore[misc]  # Ray awaits it
        import ray

        from hotswap_server import app
        from hotswap_server.logging import configure_logging

        configure_logging(settings.log_level, settings.log_format)
        if settings.threads is None:
            cores = ray.get_runtime_context().get_assigned_resources().get("CPU", 1)
            settings = settings.model_copy(update={"threads": max(1, int(cores))})
        self._stop = asyncio.Event()
        ready: asyncio.Future[app.Ready] = asyncio.get_running_loop().create_future()
        loaded = await asyncio.to_thread(app.load, settings)
        self._serving = asyncio.create_task(app.run(loaded, ready.set_result, stop=self._stop))
        either: set[asyncio.Future[Any]] = {self._serving, ready}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not ready.done():
            await self._serving
        self._channel = grpc.aio.insecure_channel(ready.result().address, _UNLIMITED)

    async def hold(self, adapter: str) -> str:
        """Tells Ray that this replica has the adapter. `serve.multiplexed` counts as many as there are slots;
        which ones are in memory is for the server to say."""
        return adapter

    async def check_health(self) -> None:
        """Ray replaces a replica where this raises."""
        if self._serving.done():
            raise RuntimeError("the server has ended")
        answer = await self.Check(health_pb2.HealthCheckRequest(), None)  # type: ignore[attr-defined]
        if answer.status != health_pb2.HealthCheckResponse.SERVING:
            raise RuntimeError("the engine is broken")

    async def close(self) -> None:
        """Ray's destructor, once no call runs here."""
        await self._channel.close(None)
        self._stop.set()
        await self._serving

    async def _held(self, context: Any) -> None:
        """After a call went well, or names that no store knows would push out those that are held."""
        adapter = context.multiplexed_model_id()
        if adapter:
            await self.hold(adapter)


def _relay(method: MethodDescriptor) -> Any:
    path = f"/{method.containing_service.full_name}/{method.name}"
    request_type, response_type = GetMessageClass(method.input_type), GetMessageClass(method.output_type)
    coding = request_type.SerializeToString, response_type.FromString

    async def unary(self: Replica, request: Any, grpc_context: Any) -> Any:
        call = self._channel.unary_unary(path, *coding)(request, **_call_options(grpc_context))
        try:
            response = await call
        except grpc.aio.AioRpcError as error:
            return await _failed(call, error, grpc_context, response_type)
        if grpc_context is not None:
            await self._held(grpc_context)
            grpc_context.set_trailing_metadata(list(await call.trailing_metadata()))
        return response

    async def stream(self: Replica, request: Any, grpc_context: Any) -> AsyncIterator[Any]:
        call = self._channel.unary_stream(path, *coding)(request, **_call_options(grpc_context))
        first = True
        try:
            async for message in call:
                if first:
                    await self._held(grpc_context)
                    first = False
                yield message
            grpc_context.set_trailing_metadata(list(await call.trailing_metadata()))
            yield response_type()  # which the edge takes the metadata from
        except grpc.aio.AioRpcError as error:
            yield await _failed(call, error, grpc_context, response_type)
        finally:
            call.cancel()

    return stream if method.server_streaming else unary


for _service in (
    *inference_pb2.DESCRIPTOR.services_by_name.values(),
    *adapters_pb2.DESCRIPTOR.services_by_name.values(),
):
    for _method in _service.methods:
        setattr(Replica, _method.name, _relay(_method))
# Watch would hold a replica for as long as somebody watches.
Replica.Check = _relay(health_pb2.DESCRIPTOR.services_by_name["Health"].methods_by_name["Check"])  # type: ignore[attr-defined]


def _call_options(context: Any) -> dict[str, Any]:
    if context is None:
        return {"timeout": None}
    given = list(context.invocation_metadata())
    timeout = next((float(value) for key, value in given if key == TIMEOUT_KEY), None)
    relayed = tuple(
        (key, value) for key, value in given if key not in _NOT_RELAYED and not key.startswith("grpc-")
    )
    return {"timeout": timeout, "metadata": relayed}


async def _failed(call: Any, error: grpc.aio.AioRpcError, context: Any, response_type: Any) -> Any:
    """An empty message, which brings the call's status: raised, an error would lose its details."""
    if context is None:
        raise error
    context.set_code(error.code())
    context.set_details(error.details() or "")
    context.set_trailing_metadata(list(error.trailing_metadata() or ()))
    return response_type()
