"""The asyncio client: `_sync.py` with `await`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import grpc
from grpc import aio

from hotswap_client import _calls, _errors, _parsing
from hotswap_client._calls import (
    AdapterOptions,
    CalibrateOptions,
    GenerateOptions,
    ListOptions,
    ScoreOptions,
    TokenizeOptions,
)
from hotswap_client._replicas import Affinity
from hotswap_client._results import (
    Adapter,
    AdapterTransition,
    GenerateResult,
    InUsePolicy,
    MethodCost,
    Residency,
    ScoreResult,
    StreamDelta,
    TokenizeResult,
    UnloadResult,
)
from hotswap_client._settings import TLS, Settings

Result = TypeVar("Result")


class AsyncClient:
    """`Client` for asyncio, with the same options; use it within one event loop. A cancelled task cancels its
    call."""

    def __init__(
        self,
        target: str | None = None,
        *,
        targets: Sequence[str] | None = None,
        affinity: Affinity | None = None,
        api_key: str | None = None,
        timeout: float | None = None,
        retries: int = 3,
        tls: TLS | bool = False,
        allow_plaintext_key: bool = False,
    ) -> None:
        self._settings = Settings.of(
            target, api_key, timeout, retries, tls, allow_plaintext_key, targets, affinity
        )
        options, files = self._settings.channel_options(), self._settings.tls
        self._channel = (
            aio.insecure_channel(self._settings.target, options)
            if files is None
            else aio.secure_channel(self._settings.target, files.credentials(), options)
        )
        self.adapters = AsyncAdapters(self)

    async def generate(self, **options: Unpack[GenerateOptions]) -> GenerateResult:
        """Generate a completion. See `GenerateOptions`."""
        return await self._run(_calls.generate(**options))

    def stream(self, **options: Unpack[GenerateOptions]) -> AsyncStream:
        """Generate a completion piece by piece: `async for delta in client.stream(…)`. See `GenerateOptions`,
        and `AsyncStream` for how to stop early."""
        parser = _parsing.StreamParser()
        call = _calls.stream(parser.parse, **options)
        method = self._channel.unary_stream(
            call.method, type(call.request).SerializeToString, call.response.FromString
        )
        return AsyncStream(method(call.request, **self._settings.call_options(call)), parser)

    async def score(self, **options: Unpack[ScoreOptions]) -> ScoreResult:
        """Log-probabilities of a given text. See `ScoreOptions`."""
        return await self._run(_calls.score(**options))

    async def tokenize(self, **options: Unpack[TokenizeOptions]) -> TokenizeResult:
        """The tokens that `generate` would read. See `TokenizeOptions`."""
        return await self._run(_calls.tokenize(**options))

    async def close(self) -> None:
        """Cancel the calls that run and close the connection."""
        await self._channel.close(None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._settings.describe()})"

    async def _run(self, call: _calls.Call[Result]) -> Result:
        method = self._channel.unary_unary(
            call.method, type(call.request).SerializeToString, call.response.FromString
        )
        try:
            reply = await method(call.request, **self._settings.call_options(call))
        except grpc.RpcError as error:
            raise _errors.from_rpc_error(error) from None
        return call.parse(reply)


class AsyncStream(AsyncIterator[StreamDelta]):
    """`Stream` for asyncio: use `async with`, `close()`, or drop it to cancel a call that still runs."""

    def __init__(self, call: Any, parser: _parsing.StreamParser) -> None:
        self._call = call
        self._replies = call.__aiter__()
        self._parser = parser

    @property
    def result(self) -> GenerateResult | None:
        """The whole completion, or None while the generation runs or if it was stopped early."""
        return self._parser.result

    async def __anext__(self) -> StreamDelta:
        try:
            return self._parser.parse(await anext(self._replies))
        except StopAsyncIteration:
            self._parser.finish()
            raise
        except grpc.RpcError as error:
            raise _errors.from_rpc_error(error) from None

    async def close(self) -> None:
        """Cancel the call if it still runs."""
        self._call.cancel()

    def __del__(self) -> None:
        # gRPC's own call would do this as the blocking one does, were it not held by its tasks.
        if not self._call.done():
            self._call.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()


class AsyncAdapters:
    """The server's adapters; `client.adapters`. Names are `tenant/name`."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def list(self, **options: Unpack[ListOptions]) -> tuple[Adapter, ...]:
        """Adapters by name and version: the newest of each and older ones in memory. See `ListOptions`."""
        found: tuple[Adapter, ...] = ()
        token = ""
        while True:
            page, token = await self._client._run(_calls.list_adapters(token, **options))
            found += page
            if not token:
                return found

    async def show(self, name: str, **options: Unpack[AdapterOptions]) -> Adapter:
        """One version of an adapter, by default what requests get."""
        return await self._client._run(_calls.show(name, **options))

    async def load(
        self, name: str, *, to: Residency | str = Residency.DEVICE, **options: Unpack[AdapterOptions]
    ) -> AdapterTransition:
        """Bring a version, by default what requests get, to the device, or to host memory alone."""
        return await self._client._run(_calls.load(name, to, **options))

    async def unload(
        self, name: str, *, in_use: InUsePolicy | str = InUsePolicy.REFUSE, **options: Unpack[AdapterOptions]
    ) -> UnloadResult:
        """Remove a version, by default all, from memory. `in_use`: what to do about requests that use it."""
        return await self._client._run(_calls.unload(name, in_use, **options))

    async def pin(self, name: str, **options: Unpack[AdapterOptions]) -> Adapter:
        """Load a version, by default what requests get, and keep it on the device."""
        return await self._client._run(_calls.pin(name, **options))

    async def unpin(self, name: str, **options: Unpack[AdapterOptions]) -> tuple[Adapter, ...]:
        """Let a version, by default every pinned one, be evicted again."""
        return await self._client._run(_calls.unpin(name, **options))

    async def merge(self, name: str, **options: Unpack[AdapterOptions]) -> AdapterTransition:
        """Add a LoRA, by default its newest version, into the base weights."""
        return await self._client._run(_calls.merge(name, **options))

    async def unmerge(self, name: str, **options: Unpack[AdapterOptions]) -> AdapterTransition:
        """Restore the base weights."""
        return await self._client._run(_calls.unmerge(name, **options))

    async def calibrate(self, **options: Unpack[CalibrateOptions]) -> tuple[MethodCost, ...]:
        """Measure what each method costs on the live model; takes seconds. See `CalibrateOptions`."""
        return await self._client._run(_calls.calibrate(**options))
