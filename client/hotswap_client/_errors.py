"""The error tree, and how a failed gRPC call becomes one of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]
from grpc_status import rpc_status


class HotswapError(Exception):
    """A call that failed.

    `message` is the server's text, `reason` the stable identifier of `google.rpc.ErrorInfo` (empty if the
    server gave none) with its `metadata`, and `retry_after` the seconds after which the same call may work
    (None if the server gave no hint).
    """

    code: grpc.StatusCode = grpc.StatusCode.UNKNOWN

    def __init__(
        self,
        message: str,
        *,
        code: grpc.StatusCode | None = None,
        reason: str = "",
        metadata: Mapping[str, str] | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or type(self).code
        self.reason = reason
        self.metadata = dict(metadata or {})
        self.retry_after = retry_after


class InvalidArgument(HotswapError):
    """A field of the request has a value that cannot work; `field` is its path, such as `sampling.top_p`."""

    code = grpc.StatusCode.INVALID_ARGUMENT
    field: str = ""


class InvalidCall(InvalidArgument, TypeError):
    """The arguments cannot make a request; nothing was sent."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


class NotFound(HotswapError):
    """No such adapter, or no such version of it."""

    code = grpc.StatusCode.NOT_FOUND


class FailedPrecondition(HotswapError):
    """The adapter or the server is in a state that does not allow the call; `reason` says which."""

    code = grpc.StatusCode.FAILED_PRECONDITION


class ResourceExhausted(HotswapError):
    """A limit was met: of the queue, of memory or of a message's size."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED


class DeadlineExceeded(HotswapError):
    """The call's `timeout` passed."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED


class Cancelled(HotswapError):
    """The call was cancelled, here or by the server."""

    code = grpc.StatusCode.CANCELLED


class Unavailable(HotswapError):
    """The server cannot be reached or takes no requests now; retries did not help."""

    code = grpc.StatusCode.UNAVAILABLE


class Unauthenticated(HotswapError):
    """The server wants an API key, or does not know this one."""

    code = grpc.StatusCode.UNAUTHENTICATED


class PermissionDenied(HotswapError):
    """The API key does not allow this call."""

    code = grpc.StatusCode.PERMISSION_DENIED


class Unimplemented(HotswapError):
    """The server does not have this call, or not with these arguments."""

    code = grpc.StatusCode.UNIMPLEMENTED


class Internal(HotswapError):
    """The server failed."""

    code = grpc.StatusCode.INTERNAL


_TREE: tuple[type[HotswapError], ...] = (
    InvalidArgument,
    NotFound,
    FailedPrecondition,
    ResourceExhausted,
    DeadlineExceeded,
    Cancelled,
    Unavailable,
    Unauthenticated,
    PermissionDenied,
    Unimplemented,
    Internal,
)
_BY_CODE = {error.code: error for error in _TREE} | {
    grpc.StatusCode.OUT_OF_RANGE: InvalidArgument,
    grpc.StatusCode.DATA_LOSS: Internal,
}


def from_rpc_error(error: grpc.RpcError) -> HotswapError:
    """The typed error of a failed call, sync or asyncio: both kinds answer `code()`, `details()` and
    `trailing_metadata()`."""
    call: Any = error
    code: grpc.StatusCode = call.code()
    info, field, retry_after = error_details_pb2.ErrorInfo(), "", None
    for detail in _rich_status(call).details:
        if detail.Unpack(info):
            continue
        bad_request, retry = error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
        if detail.Unpack(bad_request) and bad_request.field_violations:
            field = bad_request.field_violations[0].field
        elif detail.Unpack(retry):
            retry_after = retry.retry_delay.ToTimedelta().total_seconds()
    result = _BY_CODE.get(code, HotswapError)(
        call.details() or code.name,
        code=code,
        reason=info.reason,
        metadata=info.metadata,
        retry_after=retry_after,
    )
    if isinstance(result, InvalidArgument):
        result.field = field
    return result


def _rich_status(call: Any) -> status_pb2.Status:
    """The status details, or an empty status where a server or proxy sent none or damaged ones."""
    try:
        return rpc_status.from_call(call) or status_pb2.Status()
    except (ValueError, DecodeError):
        return status_pb2.Status()
