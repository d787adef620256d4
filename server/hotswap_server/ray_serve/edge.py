"""In Ray's gRPC proxy: which adapter a call is for, how long it may take, and the details of its error.

The functions are for `grpc_servicer_functions`. Ray's proxy puts handlers of its own, which go to a replica,
in place of those that they register; each is wrapped here once more.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, MutableMapping, Sequence
from typing import Any, Final

from grpc_health.v1 import health_pb2_grpc
from hotswap.v1 import adapters_pb2_grpc, inference_pb2_grpc

MODEL_ID_KEY: Final = "multiplexed_model_id"
"""By which Ray looks for a replica that holds a model already."""
TIMEOUT_KEY: Final = "hotswap-timeout"
"""The seconds that a call has left when it reaches the proxy, which tells replicas of no deadline."""
_MAX_NAME_LENGTH: Final = 256  # of what may be an adapter; anything longer is none

Register = Callable[[Any, Any], None]


def add_inference_service(servicer: Any, server: Any) -> None:
    """InferenceService, for `grpc_servicer_functions`."""
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(servicer, _edge(server))


def add_adapter_service(servicer: Any, server: Any) -> None:
    """AdapterService, for `grpc_servicer_functions`. Each call reaches one replica."""
    adapters_pb2_grpc.add_AdapterServiceServicer_to_server(servicer, _edge(server))


def add_health(servicer: Any, server: Any) -> None:
    """`grpc.health.v1`'s Check, for `grpc_servicer_functions`: whether a replica answers and is sound."""
    health_pb2_grpc.add_HealthServicer_to_server(servicer, _edge(server))


def _edge(server: Any) -> Any:
    return _Edge(server)


class _Edge:
    """What generated code registers a service at: Ray's server, with the handlers that it makes wrapped."""

    def __init__(self, server: Any) -> None:
        self._server = server

    def add_generic_rpc_handlers(self, generic_rpc_handlers: Sequence[Any]) -> None:
        self._server.add_generic_rpc_handlers(generic_rpc_handlers)
        handlers: MutableMapping[str, Any] = generic_rpc_handlers[0]._method_handlers
        for method, handler in handlers.items():
            handlers[method] = handler._replace(
                unary_unary=_unary(handler.unary_unary), unary_stream=_stream(handler.unary_stream)
            )

    def add_registered_method_handlers(self, service_name: str, method_handlers: Any) -> None:
        """The same handlers a second time, which gRPC would prefer to those that are wrapped."""


def _unary(inner: Any) -> Any:
    async def unary(request: Any, context: Any) -> Any:
        return await inner(request, _Call(request, context))

    return unary


def _stream(inner: Any) -> Any:
    async def stream(request: Any, context: Any) -> AsyncIterator[bytes]:
        async for message in inner(request, _Call(request, context)):
            if message:  # an empty one brings the trailing metadata, which Ray lets only messages bring
                yield message

    return stream


class _Call:
    """A call's context, whose metadata also say what Ray and the replica want to know."""

    def __init__(self, request: Any, context: Any) -> None:
        self._context = context
        # Versions of an adapter belong together, as does what is asked about it.
        name: str = getattr(request, "adapter", "") or getattr(request, "name", "")
        self._model_id = name.partition("@")[0] if len(name) <= _MAX_NAME_LENGTH else ""

    def invocation_metadata(self) -> tuple[tuple[str, Any], ...]:
        own = (MODEL_ID_KEY, TIMEOUT_KEY)
        given = tuple(
            (key, value) for key, value in self._context.invocation_metadata() or () if key not in own
        )
        routing = ((MODEL_ID_KEY, self._model_id),) if self._model_id else ()
        remaining = self._context.time_remaining()
        timeout = () if remaining is None else ((TIMEOUT_KEY, f"{remaining:.6f}"),)
        return (*given, *routing, *timeout)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)
