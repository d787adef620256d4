"""The blocking client."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import grpc

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


class Client:
    """A client of one server, by default `localhost:50051`, or of its replicas; threads may share it.

    `targets` are replicas that serve the same store: each HOST:PORT, or a single name with all their
    addresses, `dns:///NAME:PORT`. They get calls in turn, or with `affinity="adapter"` each adapter's calls
    go to the same one; in any case only to those that say they serve.

    `api_key` goes with every call as a bearer token. `timeout` is every call's, in seconds, unless the call
    has its own. A call that fails with UNAVAILABLE before its first reply is tried up to `retries` (0 to 4)
    times more. `tls` is True for a server with a publicly trusted certificate, or a `TLS` with files. Without
    it a key is sent to this machine alone, or with `allow_plaintext_key` to every target.

    Calls raise `HotswapError`s: `InvalidCall` before anything is sent, the others as the server answers.
    """

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
            grpc.insecure_channel(self._settings.target, options)
            if files is None
            else grpc.secure_channel(self._settings.target, files.credentials(), options)
        )
        self.adapters = Adapters(self)

    def generate(self, **options: Unpack[GenerateOptions]) -> GenerateResult:
        """Generate a completion. See `GenerateOptions`."""
        return self._run(_calls.generate(**options))

    def stream(self, **options: Unpack[GenerateOptions]) -> Stream:
        """Generate a completion piece by piece. See `GenerateOptions`, and `Stream` for how to stop early."""
        parser = _parsing.StreamParser()
        call = _calls.stream(parser.parse, **options)
        method = self._channel.unary_stream(
            call.method, type(call.request).SerializeToString, call.response.FromString
        )
        return Stream(method(call.request, **self._settings.call_options(call)), parser)

    def score(self, **options: Unpack[ScoreOptions]) -> ScoreResult:
        """Log-probabilities of a given text. See `ScoreOptions`."""
        return self._run(_calls.score(**options))

    def tokenize(self, **options: Unpack[TokenizeOptions]) -> TokenizeResult:
        """The tokens that `generate` would read. See `TokenizeOptions`."""
        return self._run(_calls.tokenize(**options))

    def close(self) -> None:
        """Cancel the calls that run and close the connection."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._settings.describe()})"

    def _run(self, call: _calls.Call[Result]) -> Result:
        method = self._channel.unary_unary(
            call.method, type(call.request).SerializeToString, call.response.FromString
        )
        try:
            reply = method(call.request, **self._settings.call_options(call))
        except grpc.RpcError as error:
            raise _errors.from_rpc_error(error) from None
        return call.parse(reply)


class Stream(Iterator[StreamDelta]):
    """Deltas of a running generation; the last one carries the whole `result`, which then stays here too.

    Leaving a `with` block, `close()`, or dropping the stream (as a `for` loop over `client.stream(…)` does
    when it breaks) cancels the call if it still runs.
    """

    def __init__(self, call: Any, parser: _parsing.StreamParser) -> None:
        self._call = call
        self._parser = parser

    @property
    def result(self) -> GenerateResult | None:
        """The whole completion, or None while the generation runs or if it was stopped early."""
        return self._parser.result

    def __next__(self) -> StreamDelta:
        try:
            return self._parser.parse(next(self._call))
        except StopIteration:
            self._parser.finish()
            raise
        except grpc.RpcError as error:
            raise _errors.from_rpc_error(error) from None

    def close(self) -> None:
        """Cancel the call if it still runs."""
        self._call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class Adapters:
    """The server's adapters; `client.adapters`. Names are `tenant/name`."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def list(self, **options: Unpack[ListOptions]) -> tuple[Adapter, ...]:
        """Adapters by name and version: the newest of each and older ones in memory. See `ListOptions`."""
        found: tuple[Adapter, ...] = ()
        token = ""
        while True:
            page, token = self._client._run(_calls.list_adapters(token, **options))
            found += page
            if not token:
                return found

    def show(self, name: str, **options: Unpack[AdapterOptions]) -> Adapter:
        """One version of an adapter, by default what requests get."""
        return self._client._run(_calls.show(name, **options))

    def load(
        self, name: str, *, to: Residency | str = Residency.DEVICE, **options: Unpack[AdapterOptions]
    ) -> AdapterTransition:
        """Bring a version, by default what requests get, to the device, or to host memory alone."""
        return self._client._run(_calls.load(name, to, **options))

    def unload(
        self, name: str, *, in_use: InUsePolicy | str = InUsePolicy.REFUSE, **options: Unpack[AdapterOptions]
    ) -> UnloadResult:
        """Remove a version, by default all, from memory. `in_use`: what to do about requests that use it."""
        return self._client._run(_calls.unload(name, in_use, **options))

    def pin(self, name: str, **options: Unpack[AdapterOptions]) -> Adapter:
        """Load a version, by default what requests get, and keep it on the device."""
        return self._client._run(_calls.pin(name, **options))

    def unpin(self, name: str, **options: Unpack[AdapterOptions]) -> tuple[Adapter, ...]:
        """Let a version, by default every pinned one, be evicted again."""
        return self._client._run(_calls.unpin(name, **options))

    def merge(self, name: str, **options: Unpack[AdapterOptions]) -> AdapterTransition:
        """Add a LoRA, by default its newest version, into the base weights."""
        return self._client._run(_calls.merge(name, **options))

    def unmerge(self, name: str, **options: Unpack[AdapterOptions]) -> AdapterTransition:
        """Restore the base weights."""
        return self._client._run(_calls.unmerge(name, **options))

    def calibrate(self, **options: Unpack[CalibrateOptions]) -> tuple[MethodCost, ...]:
        """Measure what each method costs on the live model; takes seconds. See `CalibrateOptions`."""
        return self._client._run(_calls.calibrate(**options))
