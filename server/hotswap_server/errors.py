"""Errors a caller can cause. Each names field and remedy; `grpc/status.py` maps them to gRPC codes."""

from __future__ import annotations


class HotswapError(Exception):
    """Base of the server's typed errors.

    `reason` is the stable UPPER_SNAKE_CASE identifier sent as `google.rpc.ErrorInfo.reason`;
    `metadata` goes into the same message. `transient` says that the storage may answer the very same call
    differently a moment later, so that a loader tries again.
    """

    reason = "INTERNAL"
    transient = False

    def __init__(self, message: str, **metadata: str) -> None:
        super().__init__(message)
        self.metadata = metadata


class InvalidRequestError(HotswapError):
    """A request field has a value that can never work."""

    reason = "INVALID_REQUEST"

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}", field=field)
        self.field = field


class AdapterNotFoundError(HotswapError):
    """The store has no such adapter or no such version of it."""

    reason = "ADAPTER_NOT_FOUND"


class AdapterInvalidError(HotswapError):
    """The adapter's files are damaged, do not fit the base, or use an option that is not served."""

    reason = "ADAPTER_INVALID"


class AdapterDamagedError(AdapterInvalidError):
    """The files are not those that were published: a size or a digest differs from the manifest's."""

    reason = "ADAPTER_DAMAGED"


class StoreUnavailableError(HotswapError):
    """The store could not be read; the same call may work later."""

    reason = "STORE_UNAVAILABLE"
    transient = True


class StoreDeniedError(StoreUnavailableError):
    """The store does not let the server read; an operator has to change credentials or permissions."""

    reason = "STORE_DENIED"
    transient = False


class AdapterInUseError(HotswapError):
    """The operation must wait until requests that use the adapter have finished."""

    reason = "ADAPTER_IN_USE"


class MergeRefusedError(HotswapError):
    """The adapter cannot be merged into the base weights, or not taken out of them; served, it still is."""

    reason = "MERGE_REFUSED"


class RequestCancelledError(HotswapError):
    """The caller left before the request was finished; recorded, never sent."""

    reason = "CANCELLED"


class AdapterQuarantinedError(HotswapError):
    """The adapter gave logits that are not finite, and is served no more."""

    reason = "ADAPTER_QUARANTINED"


class AdapterUnloadedError(HotswapError):
    """The adapter was unloaded, by an operator who did not wait for its requests."""

    reason = "ADAPTER_UNLOADED"


class CapacityError(HotswapError):
    """The request can never fit the memory or slots this server was started with."""

    reason = "CAPACITY_EXCEEDED"


class OverloadedError(HotswapError):
    """The server has all it can take; the call may work in `retry_after` seconds."""

    reason = "OVERLOADED"

    def __init__(self, message: str, *, retry_after: float = 1.0, **metadata: str) -> None:
        super().__init__(message, **metadata)
        self.retry_after = retry_after


class DeadlineTooShortError(HotswapError):
    """The call's deadline comes before the request can be done."""

    reason = "DEADLINE_TOO_SHORT"


class UnauthenticatedError(HotswapError):
    """The call shows no API key or client certificate that this server knows."""

    reason = "UNAUTHENTICATED"


class PermissionDeniedError(HotswapError):
    """The caller's role does not include the call. Never says whether an adapter exists."""

    reason = "PERMISSION_DENIED"


class RateLimitedError(HotswapError):
    """The caller has met a limit of its own; the call may work in `retry_after` seconds."""

    reason = "RATE_LIMITED"

    def __init__(self, message: str, *, retry_after: float = 1.0, **metadata: str) -> None:
        super().__init__(message, **metadata)
        self.retry_after = retry_after


class DrainingError(HotswapError):
    """The server is shutting down and takes no new requests."""

    reason = "DRAINING"


class EngineError(HotswapError):
    """A step of the engine failed; the request is lost, the server goes on."""

    reason = "ENGINE_FAILED"


class BaseModelError(HotswapError):
    """The base model cannot be served; the message says why and what can."""

    reason = "BASE_UNSUPPORTED"
