"""A scripted engine of the shape of EngineService, behind the real gRPC server and a real channel."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from grpc_status import rpc_status
from hotswap.aliases import Target
from hotswap.names import AdapterReference
from hotswap.v1 import adapters_pb2_grpc, inference_pb2_grpc
from hotswap_server.adapters.merges import MergeChange
from hotswap_server.adapters.residency import AdapterInfo, InUse, Residency
from hotswap_server.core import (
    AdapterRef,
    Delta,
    Finished,
    FinishReason,
    GenerateRequest,
    Scored,
    ScoreRequest,
    ServingPath,
    Timings,
    TokenLogprob,
)
from hotswap_server.engine.calibration import Calibration, MethodCost
from hotswap_server.errors import (
    AdapterInUseError,
    AdapterNotFoundError,
    DrainingError,
    MergeRefusedError,
)
from hotswap_server.grpc.server import Bound, GrpcServer
from hotswap_server.metrics import Metrics

VOCAB_SIZE = 300


class ByteTokenizer:
    """One token per byte; `<chat>` stands for the template."""

    chat_template: str | None = "a template"

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}

    def apply_chat_template(self, turns: list[dict[str, str]], **options: Any) -> str:
        opened = "|assistant:" if options["add_generation_prompt"] else ""
        return "|".join(f"{turn['role']}:{turn['content']}" for turn in turns) + opened


class FakeManager:
    """Adapters by name; `errors[name]` is raised instead of an answer."""

    def __init__(self) -> None:
        self.infos: dict[tuple[str, int], AdapterInfo] = {}
        self.errors: dict[str, Exception] = {}
        self.aliases: dict[str, Target] = {}
        self.unloaded: list[tuple[str, int | None, InUse]] = []
        self.listed: list[tuple[str, int]] = []  # read, perhaps

    def add(self, name: str, version: int = 1, **fields: Any) -> AdapterInfo:
        ref = AdapterRef(name, version, f"{name}{version}".encode().hex(), "lora")
        info = AdapterInfo(ref, Residency.STORE, 1000, 50, False, 0, {"r": "8"})
        self.infos[name, version] = replace(info, **fields)
        return self.infos[name, version]

    def get(self, name: str, version: int | None) -> AdapterInfo:
        if name in self.errors:
            raise self.errors[name]
        found = [v for n, v in self.infos if n == name and version in (None, v)]
        if not found:
            raise AdapterNotFoundError(f"the store has no adapter {name}", adapter=name)
        return self.infos[name, max(found)]

    def resolve(self, name: str, version: int | None, *, key: str | None = None) -> AdapterRef:
        """`name` may be a reference; an alias is looked up in `aliases`."""
        reference = AdapterReference.parse(name)
        if reference.alias is not None:
            version = self.aliases[str(reference)].choose(key, name)
        return self.get(str(reference.name), reference.version or version).ref

    def known(self) -> list[tuple[str, int]]:
        return sorted(self.infos)

    def list(self, versions: list[tuple[str, int]]) -> list[AdapterInfo]:
        self.listed += versions
        return [self.infos[version] for version in versions]

    def all_in_memory(self) -> set[tuple[str, int]]:
        return {key for key, info in self.infos.items() if info.residency is not Residency.STORE}

    def load(self, name: str, version: int | None) -> Future[AdapterInfo]:
        return self._move(name, version, residency=Residency.DEVICE)

    def prefetch(self, name: str, version: int | None) -> Future[AdapterInfo]:
        return self._move(name, version, residency=Residency.HOST)

    def pin(self, name: str, version: int | None) -> Future[AdapterInfo]:
        return self._move(name, version, residency=Residency.DEVICE, pinned=True)

    def unpin(self, name: str, version: int | None) -> list[AdapterInfo]:
        pinned = [info for info in self.in_memory(name, version) if info.pinned]
        return [self._move(name, info.ref.version, pinned=False).result() for info in pinned]

    def in_memory(self, name: str, version: int | None) -> list[AdapterInfo]:
        found = [info for (n, v), info in self.infos.items() if n == name and version in (None, v)]
        return [info for info in found if info.residency is not Residency.STORE]

    def describe(self, ref: AdapterRef) -> AdapterInfo:
        return self.infos[ref.name, ref.version]

    def _move(self, name: str, version: int | None, **fields: Any) -> Future[AdapterInfo]:
        future: Future[AdapterInfo] = Future()
        info = replace(self.get(name, version), **fields)
        self.infos[name, info.ref.version] = info
        future.set_result(info)
        return future

    def unload(self, name: str, version: int | None, *, in_use: InUse) -> Future[int]:
        keys = [key for key in self.infos if key[0] == name and version in (None, key[1])]
        if in_use is InUse.REFUSE and any(self.infos[key].running for key in keys):
            raise AdapterInUseError("in use", adapter=name)
        self.unloaded.append((name, version, in_use))
        for key in keys:
            self.infos[key] = replace(self.infos[key], residency=Residency.STORE, running=0)
        future: Future[int] = Future()
        future.set_result(len(keys))
        return future


class FakeMerges:
    """Merges at once, and unmerges nothing."""

    def __init__(self, adapters: FakeManager) -> None:
        self.adapters = adapters

    def merge(self, ref: AdapterRef) -> Future[MergeChange]:
        future: Future[MergeChange] = Future()
        future.set_result(MergeChange(self.adapters.infos[ref.name, ref.version], 0.1))
        return future

    def unmerge(self, name: str, version: int | None) -> Future[MergeChange]:
        future: Future[MergeChange] = Future()
        future.set_exception(MergeRefusedError(f"{name} is not merged", adapter=name))
        return future


class FakeCalibrator:
    """Has measured the base and, unless asked for what is there alone, a made-up LoRA."""

    def calibrate(self, *, made_up: bool) -> Future[Calibration]:
        costs = [MethodCost("none", ServingPath.BASE, 8, 1.0, 0.01, 0, False)]
        if made_up:
            costs.append(MethodCost("lora", ServingPath.BATCHED, 8, 1.25, 0.0125, 8, True))
        future: Future[Calibration] = Future()
        future.set_result(Calibration(tuple(costs), 0.5))
        return future


@dataclass
class FakeEngine:
    """Answers `num_tokens` tokens, `pause` seconds apart, or raises `error` before the first."""

    num_tokens: int = 3
    pause: float = 0.0
    error: Exception | None = None
    error_after: int = 0
    requests: list[Any] = field(default_factory=list)
    running: int = 0
    started: asyncio.Event = field(default_factory=asyncio.Event)
    ended_early: asyncio.Event = field(default_factory=asyncio.Event)
    draining: bool = False
    closed: asyncio.Event = field(default_factory=asyncio.Event)
    tokenizer: Any = field(default_factory=ByteTokenizer)
    adapters: FakeManager = field(default_factory=FakeManager)
    merges: Any = None
    calibrator: Any = field(default_factory=FakeCalibrator)
    base: Any = field(default_factory=lambda: SimpleNamespace(vocab_size=VOCAB_SIZE, max_context=4096))
    max_context: int = 4096

    def __post_init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.merges = self.merges or FakeMerges(self.adapters)

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Delta | Finished]:
        if self.draining:
            raise DrainingError("the server is shutting down")
        self.requests.append(request)
        self.running += 1
        finished = False
        self.started.set()
        path = ServingPath.BATCHED if request.adapter else ServingPath.BASE
        try:
            for index in range(self.num_tokens):
                if self.error is not None and index == self.error_after:
                    finished = True
                    raise self.error
                if self.pause:
                    await self._sleep_or_closed()
                wanted = request.sampling.logprobs is not None
                logprobs = (TokenLogprob(65 + index, -0.5, ((66, -1.5),)),) if wanted else ()
                yield Delta((65 + index % 26,), chr(65 + index % 26), logprobs)
            finished = True
            yield Finished(
                FinishReason.LENGTH,
                len(request.prompt_ids),
                self.num_tokens,
                path,
                Timings(0.1, 0.2, 0.3, 0.4),
            )
        finally:
            self.running -= 1
            if not finished:
                self.ended_early.set()

    async def _sleep_or_closed(self) -> None:
        try:
            await asyncio.wait_for(self.closed.wait(), self.pause)
        except TimeoutError:
            return
        raise DrainingError("the server shut down before the request was finished")

    async def score(self, request: ScoreRequest) -> Scored:
        self.requests.append(request)
        if self.error is not None:
            raise self.error
        scored = request.prompt_ids[request.score_from :]
        logprobs = tuple(TokenLogprob(token, -1.0) for token in scored)
        return Scored(logprobs, len(request.prompt_ids), ServingPath.BASE)

    async def drain(self, timeout: float) -> None:
        self.draining = True
        deadline = self._loop.time() + timeout
        while self.running and self._loop.time() < deadline:
            await asyncio.sleep(0.01)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self.closed.set)


@dataclass
class Serving:
    """A started server and stubs of a channel to it."""

    engine: FakeEngine
    metrics: Metrics
    server: GrpcServer
    channel: grpc.aio.Channel
    inference: Any
    admin: Any
    bound: Bound

    def sample(self, name: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(name, labels)


@asynccontextmanager
async def _serving(
    *, credentials: grpc.ChannelCredentials | None = None, **options: Any
) -> AsyncIterator[Serving]:
    """`credentials` of the channel to the server's own port; its other options are the server's."""
    engine, metrics = FakeEngine(), Metrics()
    settings = {"max_message_bytes": 64 << 10, "max_timeout": 60.0, "store_timeout": 30.0} | options
    server = GrpcServer(engine, metrics, **settings)  # type: ignore[arg-type]
    bound = await server.start("127.0.0.1", 0)
    target = f"localhost:{bound.port}"
    try:
        async with (
            grpc.aio.insecure_channel(target)
            if credentials is None
            else grpc.aio.secure_channel(target, credentials)
        ) as channel:
            yield Serving(
                engine,
                metrics,
                server,
                channel,
                inference_pb2_grpc.InferenceServiceStub(channel),
                adapters_pb2_grpc.AdapterServiceStub(channel),
                bound,
            )
    finally:
        await server.stop(0)


@pytest.fixture
def serving() -> Callable[..., Any]:
    """`async with serving(**options of GrpcServer) as s` starts a server over a fake engine."""
    return _serving


@dataclass
class Refusal:
    """A failed call: code, text and details by the name of their type."""

    code: grpc.StatusCode
    message: str
    details: dict[str, Any]


@pytest.fixture
def refusal_of() -> Callable[..., Any]:
    """`await refusal_of(call)` is how a call failed; the call must fail."""
    from google.rpc import error_details_pb2

    async def refusal(call: Any) -> Refusal:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        status = rpc_status.from_call(caught.value)
        details: dict[str, Any] = {}
        for detail in status.details if status else ():
            name = detail.TypeName().rpartition(".")[2]
            details[name] = getattr(error_details_pb2, name)()
            detail.Unpack(details[name])
        return Refusal(caught.value.code(), caught.value.details() or "", details)

    return refusal
