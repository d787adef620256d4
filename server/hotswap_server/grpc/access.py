"""Who calls, whether it may, and what it may use: stands between every call and its servicer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager, suppress
from typing import Any, Final

import grpc
import structlog
from google.protobuf.message import DecodeError
from grpc_health.v1 import health
from hotswap.names import AdapterName, InvalidAdapterNameError

from hotswap_server.errors import HotswapError, InvalidRequestError, PermissionDeniedError
from hotswap_server.grpc.interceptors import API_PREFIX, CallInfo, current_call
from hotswap_server.grpc.status import code_of, status_of
from hotswap_server.security.access import Access, Shown
from hotswap_server.security.disguise import Disguise
from hotswap_server.security.limits import Limiter
from hotswap_server.security.principals import Principal
from hotswap_server.security.rules import RULES, Rule

AUTHORIZATION: Final = "authorization"
_OPEN_PREFIX: Final = f"/{health.SERVICE_NAME}/"
# The names of a client certificate that gRPC has checked against the client authority.
_CERTIFICATE_NAMES: Final = ("x509_subject_alternative_name", "x509_common_name")

audit = structlog.stdlib.get_logger("hotswap_server.audit")


class AccessInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Inside of `CallInterceptor`, which makes statuses of what it raises.

    Requests are parsed here, after the caller is known. Health stays open; reflection needs a known caller.
    """

    def __init__(self, access: Access) -> None:
        self._access = access
        self._limiter = Limiter()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any]]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        handler: Any = await continuation(handler_call_details)
        name: str = handler_call_details.method
        if handler is None or name.startswith(_OPEN_PREFIX):
            return handler  # type: ignore[no-any-return]
        if not name.startswith(API_PREFIX):
            return self._for_known_callers(handler)
        rule, parse = RULES.get(name), handler.request_deserializer
        if handler.response_streaming:

            async def stream(data: bytes, context: Any) -> AsyncIterator[Any]:
                with self._admitted(rule, parse, data, context) as request:
                    async with aclosing(handler.unary_stream(request, context)) as messages:
                        async for message in messages:
                            yield message

            return grpc.unary_stream_rpc_method_handler(
                stream, response_serializer=handler.response_serializer
            )

        async def unary(data: bytes, context: Any) -> Any:
            with self._admitted(rule, parse, data, context) as request:
                return await handler.unary_unary(request, context)

        return grpc.unary_unary_rpc_method_handler(unary, response_serializer=handler.response_serializer)

    def _for_known_callers(self, handler: Any) -> grpc.RpcMethodHandler[Any, Any]:
        """Reflection, which is the one service beside health that is not ours."""
        if not self._access.required:
            return handler  # type: ignore[no-any-return]

        async def guarded(requests: Any, context: Any) -> AsyncIterator[Any]:
            try:
                self._access.authenticate(_shown(context))
            except HotswapError as error:
                await context.abort_with_status(status_of(error))
            async for message in handler.stream_stream(requests, context):
                yield message

        return grpc.stream_stream_rpc_method_handler(
            guarded, handler.request_deserializer, handler.response_serializer
        )

    @contextmanager
    def _admitted(
        self, rule: Rule | None, parse: Callable[[bytes], Any], data: bytes, context: Any
    ) -> Iterator[Any]:
        """The request, in a form that the servicer may answer."""
        call = current_call()
        with _audited(rule, call):
            principal = call.principal = self._access.authenticate(_shown(context))
            if self._access.required:
                call.facts["principal"] = principal.name
            with self._limiter.admit(principal) as call.spend:
                request = _parsed(parse, data)
                field = None if rule is None else rule.adapter_field
                if self._access.required and (rule is None or principal.role < rule.role):
                    _note_adapter(call, request, field)
                    raise _denied(call.rpc, rule, principal)
                with _disguised(principal, call, request, field):
                    yield request


@contextmanager
def _disguised(principal: Principal, call: CallInfo, request: Any, field: str | None) -> Iterator[None]:
    """Name another adapter, which no store has, in a request for one that `principal` may not use."""
    name = "" if field is None else getattr(request, field)
    if field is None or not name or principal.adapters.all:
        yield
        return
    name, at, version = name.partition("@")
    try:
        allowed = principal.adapters.match(str(AdapterName.parse(name)))
    except InvalidAdapterNameError as error:
        raise InvalidRequestError(field, str(error)) from None
    if allowed:
        yield
        return
    disguise = Disguise.of(name)
    setattr(request, field, f"{disguise.stand_in}{at}{version}")
    try:
        yield
    except HotswapError as error:
        raise disguise.reveal_error(error) from None
    finally:
        call.facts["adapter"] = name


@contextmanager
def _audited(rule: Rule | None, call: CallInfo) -> Iterator[None]:
    """One line for each call that not every caller may make, however it ends."""
    result = grpc.StatusCode.OK
    try:
        yield
    except asyncio.CancelledError:
        result = grpc.StatusCode.CANCELLED
        raise
    except Exception as error:
        result = code_of(error)
        raise
    finally:
        if rule is None or rule.audited:
            facts = {name: call.facts[name] for name in ("adapter", "version") if name in call.facts}
            audit.info(
                "admin_call", principal=call.facts.get("principal"), rpc=call.rpc, **facts, result=result.name
            )


def _parsed(parse: Callable[[bytes], Any], data: bytes) -> Any:
    try:
        return parse(data)
    except DecodeError:
        raise InvalidRequestError("request", "is no well-formed message of this call") from None


def _denied(rpc: str, rule: Rule | None, principal: Principal) -> PermissionDeniedError:
    if rule is None:
        return PermissionDeniedError(f"{rpc} has no rule that says who may call it, so nobody may")
    return PermissionDeniedError(
        f"{rpc} needs the role {rule.role}, and {principal.name} is {principal.role}", role=str(rule.role)
    )


def _note_adapter(call: CallInfo, request: Any, field: str | None) -> None:
    """Let the log say which adapter a refused call was about, if it named one."""
    with suppress(InvalidAdapterNameError):
        if field is not None:
            call.facts["adapter"] = str(AdapterName.parse(getattr(request, field)))


def _shown(context: Any) -> Shown:
    authorizations = tuple(
        value
        for key, value in context.invocation_metadata() or ()
        if key == AUTHORIZATION and isinstance(value, str)
    )
    checked: Any = context.auth_context()
    names = [name for kind in _CERTIFICATE_NAMES for name in checked.get(kind, ())]
    return Shown(authorizations, tuple(name.decode("utf-8", "replace") for name in names))
