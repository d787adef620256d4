"""What happens around every call: counting, time limit, errors to statuses, one line in the log."""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Final

import grpc
import structlog
from hotswap.v1 import inference_pb2

from hotswap_server.core import Trace
from hotswap_server.errors import OverloadedError
from hotswap_server.grpc.status import TimeLimitError, status_of
from hotswap_server.metrics import UNKNOWN, Metrics
from hotswap_server.security.principals import ANYBODY, Principal
from hotswap_server.tracing import CallSpan, Tracing

API_PREFIX: Final = "/hotswap.v1."
REQUEST_ID_KEY: Final = "x-request-id"
_INFERENCE: Final = frozenset(
    method.name for method in inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].methods
)
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}", re.ASCII)

logger = structlog.stdlib.get_logger(__name__)


@dataclass(slots=True)
class CallInfo:
    """What the servicers tell the log and the metrics about the current call: facts, never content."""

    rpc: str
    request_id: str
    method: str = UNKNOWN
    digest: str = ""
    facts: dict[str, object] = field(default_factory=dict)
    span: CallSpan | None = None
    principal: Principal = ANYBODY
    spend: Callable[[int], None] = lambda tokens: None
    """Takes the numbers of tokens that the call uses, as it uses them."""

    @property
    def trace(self) -> Trace | None:
        """What the call's request is traced under, if it is."""
        return None if self.span is None else self.span.trace


_current: ContextVar[CallInfo] = ContextVar("hotswap_call")


def current_call() -> CallInfo:
    """The call that this task serves."""
    return _current.get()


class CallLoad:
    """Inference calls that are being answered, and the bytes of their requests, with limits to both.

    Calls to the adapters' service are few and are let in, so that an operator can act under load.
    """

    def __init__(self, max_calls: int, max_bytes: int) -> None:
        self._max_calls = max_calls
        self._max_bytes = max_bytes
        self._num_calls = 0
        self._num_bytes = 0

    @contextmanager
    def taken(self, rpc: str, num_bytes: int) -> Iterator[None]:
        """Count a call for the time of the block.

        Raises:
            OverloadedError: there are too many, or their requests are too large together.
        """
        if rpc not in _INFERENCE:
            yield
            return
        if self._num_calls >= self._max_calls:
            raise OverloadedError(f"{self._max_calls} calls are being answered already; retry later")
        if self._num_calls and self._num_bytes + num_bytes > self._max_bytes:
            raise OverloadedError(
                f"the requests that are being answered take {self._num_bytes} bytes, with this one more than "
                f"the {self._max_bytes} that this server allows; retry later"
            )
        self._num_calls += 1
        self._num_bytes += num_bytes
        try:
            yield
        finally:
            self._num_calls -= 1
            self._num_bytes -= num_bytes


class CallInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Wraps the handlers of the API; those of health and reflection stay as they are."""

    def __init__(
        self,
        metrics: Metrics,
        *,
        max_seconds: float,
        max_calls: int,
        max_bytes: int,
        tracing: Tracing | None = None,
    ) -> None:
        self._metrics = metrics
        self._tracing = tracing
        self._max_seconds = max_seconds
        self._load = CallLoad(max_calls, max_bytes)
        self._in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def wait_idle(self) -> None:
        """Return when no call of the API is in flight."""
        await self._idle.wait()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any]]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        handler: Any = await continuation(handler_call_details)
        name: str = handler_call_details.method
        if handler is None or not name.startswith(API_PREFIX):
            return handler  # type: ignore[no-any-return]
        rpc = name.removeprefix("/")
        serializers = {
            "request_deserializer": handler.request_deserializer,
            "response_serializer": handler.response_serializer,
        }
        if handler.response_streaming:
            # A coroutine that writes by itself, so that the time limit also ends a write nobody reads.
            async def stream(request: Any, context: Any) -> None:
                async with (
                    self._call(rpc, context, request),
                    aclosing(handler.unary_stream(request, context)) as messages,
                ):
                    async for message in messages:
                        await context.write(message)

            return grpc.unary_stream_rpc_method_handler(stream, **serializers)

        async def unary(request: Any, context: Any) -> Any:
            async with self._call(rpc, context, request):
                return await handler.unary_unary(request, context)

        return grpc.unary_unary_rpc_method_handler(unary, **serializers)

    @asynccontextmanager
    async def _call(self, rpc: str, context: Any, data: bytes) -> AsyncIterator[None]:
        call = CallInfo(rpc.rpartition("/")[2], _request_id(context))
        _current.set(call)
        if self._tracing is not None:
            metadata = context.invocation_metadata() or ()
            call.span = self._tracing.start(rpc, metadata, request_id=call.request_id)
            if call.trace is not None:
                call.facts["trace_id"] = call.trace.id
        started = time.monotonic()
        code = grpc.StatusCode.OK
        self._started(call.rpc)
        context.set_trailing_metadata(((REQUEST_ID_KEY, call.request_id),))
        try:
            with structlog.contextvars.bound_contextvars(request_id=call.request_id):
                try:
                    async with asyncio.timeout(self._max_seconds) as limit:
                        with self._load.taken(call.rpc, len(data)):
                            yield
                except asyncio.CancelledError:
                    code = _code_of_cancellation(context)
                    raise
                except Exception as caught:
                    error = self._time_limit() if limit.expired() else caught
                    status = status_of(error)
                    code = status.code
                    status.trailing_metadata += ((REQUEST_ID_KEY, call.request_id),)
                    call.facts["error"] = _reason(error)
                    try:
                        await context.abort_with_status(status)
                    except grpc.aio.InternalError:
                        # The caller was gone before it could be told, which is no error of the server's.
                        raise asyncio.CancelledError from None
        finally:
            self._ended(call, code, time.monotonic() - started)

    def _time_limit(self) -> TimeLimitError:
        return TimeLimitError(
            f"the call took longer than the {self._max_seconds:g} s this server allows; ask for less, or "
            "raise --max-timeout"
        )

    def _started(self, rpc: str) -> None:
        self._in_flight += 1
        self._idle.clear()
        self._metrics.call_started(rpc)

    def _ended(self, call: CallInfo, code: grpc.StatusCode, seconds: float) -> None:
        self._in_flight -= 1
        if self._in_flight == 0:
            self._idle.set()
        self._metrics.call_ended(call.rpc, call.method, code.name, seconds, call.trace)
        if call.span is not None:
            call.span.end(code.name, method=call.method, digest=call.digest, facts=call.facts)
        logger.info(
            "call",
            rpc=call.rpc,
            request_id=call.request_id,
            code=code.name,
            method=call.method,
            seconds=round(seconds, 6),
            **call.facts,
        )


def _request_id(context: Any) -> str:
    for key, value in context.invocation_metadata() or ():
        if key == REQUEST_ID_KEY and isinstance(value, str) and _REQUEST_ID.fullmatch(value):
            return value
    return uuid.uuid4().hex


def _reason(error: Exception) -> str:
    return getattr(error, "reason", type(error).__name__)


def _code_of_cancellation(context: Any) -> grpc.StatusCode:
    remaining = context.time_remaining()
    if remaining is not None and remaining <= 0:
        return grpc.StatusCode.DEADLINE_EXCEEDED
    return grpc.StatusCode.CANCELLED
