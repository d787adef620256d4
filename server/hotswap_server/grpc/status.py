"""From errors to gRPC statuses with `google.rpc` details."""

from __future__ import annotations

import math
import uuid
from typing import Final

import grpc
import structlog
from google.protobuf import any_pb2
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]

from hotswap_server.errors import (
    AdapterInUseError,
    AdapterInvalidError,
    AdapterNotFoundError,
    AdapterQuarantinedError,
    AdapterUnloadedError,
    BaseModelError,
    CapacityError,
    DeadlineTooShortError,
    DrainingError,
    EngineError,
    HotswapError,
    InvalidRequestError,
    MergeRefusedError,
    OverloadedError,
    PermissionDeniedError,
    RateLimitedError,
    RequestCancelledError,
    StoreDeniedError,
    StoreUnavailableError,
    UnauthenticatedError,
)

DOMAIN: Final = "hotswap"
RETRY_SECONDS: Final = 1
"""What RetryInfo suggests where nothing better is known."""

# A status travels in headers, which callers accept up to 8 KiB, and the message travels twice.
_MAX_MESSAGE_BYTES = 1024
_MAX_VALUE_BYTES = 256

logger = structlog.stdlib.get_logger(__name__)


class TimeLimitError(HotswapError):
    """The call took longer than the server allows."""

    reason = "TIME_LIMIT"


_CODES: Final[tuple[tuple[type[HotswapError], grpc.StatusCode], ...]] = (
    (InvalidRequestError, grpc.StatusCode.INVALID_ARGUMENT),
    (AdapterNotFoundError, grpc.StatusCode.NOT_FOUND),
    (AdapterInvalidError, grpc.StatusCode.FAILED_PRECONDITION),
    (AdapterQuarantinedError, grpc.StatusCode.FAILED_PRECONDITION),
    (AdapterInUseError, grpc.StatusCode.FAILED_PRECONDITION),
    (MergeRefusedError, grpc.StatusCode.FAILED_PRECONDITION),
    (AdapterUnloadedError, grpc.StatusCode.CANCELLED),
    (RequestCancelledError, grpc.StatusCode.CANCELLED),
    (StoreDeniedError, grpc.StatusCode.FAILED_PRECONDITION),  # before the kind that it is one of
    (StoreUnavailableError, grpc.StatusCode.UNAVAILABLE),
    (DrainingError, grpc.StatusCode.UNAVAILABLE),
    (CapacityError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (OverloadedError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (RateLimitedError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (UnauthenticatedError, grpc.StatusCode.UNAUTHENTICATED),
    (PermissionDeniedError, grpc.StatusCode.PERMISSION_DENIED),
    (DeadlineTooShortError, grpc.StatusCode.DEADLINE_EXCEEDED),
    (TimeLimitError, grpc.StatusCode.DEADLINE_EXCEEDED),
    (EngineError, grpc.StatusCode.INTERNAL),
    (BaseModelError, grpc.StatusCode.INTERNAL),
)


class RichStatus(grpc.Status):
    """What `context.abort_with_status` takes, made of a `google.rpc.Status`."""

    def __init__(self, code: grpc.StatusCode, status: status_pb2.Status) -> None:
        self.code = code
        self.details = status.message
        self.trailing_metadata = (("grpc-status-details-bin", status.SerializeToString()),)


def status_of(error: BaseException) -> RichStatus:
    """The status of `error`. An unexpected one is logged under an id, and the caller is told only that."""
    if not isinstance(error, HotswapError):
        error_id = uuid.uuid4().hex
        logger.error("internal_error", error_id=error_id, exc_info=error)
        message = f"the server failed; its log has the cause under {error_id}"
        return _rich(grpc.StatusCode.INTERNAL, message, _info("INTERNAL", {"error_id": error_id}))
    message = _cut(str(error), _MAX_MESSAGE_BYTES)
    details: list[Message] = [_info(error.reason, error.metadata)]
    if isinstance(error, InvalidRequestError):
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=error.field, description=message.removeprefix(f"{error.field}: ")
        )
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if error.transient or isinstance(error, DrainingError):
        details.append(error_details_pb2.RetryInfo(retry_delay=Duration(seconds=RETRY_SECONDS)))
    if isinstance(error, OverloadedError | RateLimitedError):
        delay = Duration()
        delay.FromMilliseconds(math.ceil(error.retry_after * 1000))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    return _rich(code_of(error), message, *details)


def code_of(error: BaseException) -> grpc.StatusCode:
    """The code that a caller gets for `error`."""
    return next((code for kind, code in _CODES if isinstance(error, kind)), grpc.StatusCode.INTERNAL)


def _info(reason: str, metadata: dict[str, str]) -> error_details_pb2.ErrorInfo:
    short = {key: _cut(str(value), _MAX_VALUE_BYTES) for key, value in metadata.items()}
    return error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN, metadata=short)


def _rich(code: grpc.StatusCode, message: str, *details: Message) -> RichStatus:
    packed = []
    for detail in details:
        packed.append(any_pb2.Any())
        packed[-1].Pack(detail)
    number: int = code.value[0]
    return RichStatus(code, status_pb2.Status(code=number, message=message, details=packed))


def _cut(text: str, limit: int) -> str:
    encoded = text.encode("utf-8", "replace")
    if len(encoded) <= limit:
        return encoded.decode()
    return encoded[:limit].decode("utf-8", "ignore") + "…"
