"""AdapterService: what the store holds, and what is in memory."""

from __future__ import annotations

import asyncio
import base64
import binascii
import time
from collections.abc import Callable, Container, Iterable
from concurrent.futures import Future
from itertools import groupby
from typing import Any, TypeVar

from hotswap.v1 import adapters_pb2, adapters_pb2_grpc

from hotswap_server.adapters.manager import AdapterManager
from hotswap_server.adapters.merges import Merges
from hotswap_server.adapters.residency import AdapterInfo, InUse, Residency
from hotswap_server.engine.calibration import Calibrator
from hotswap_server.errors import InvalidRequestError
from hotswap_server.grpc import convert
from hotswap_server.grpc.interceptors import current_call
from hotswap_server.grpc.store_calls import StoreCalls
from hotswap_server.metrics import method_label

DEFAULT_PAGE_SIZE = 100
MAX_PAGE_SIZE = 1000

T = TypeVar("T")

_BRINGABLE = (
    adapters_pb2.RESIDENCY_UNSPECIFIED,
    adapters_pb2.RESIDENCY_HOST,
    adapters_pb2.RESIDENCY_DEVICE,
)
_IN_USE = {
    adapters_pb2.IN_USE_POLICY_UNSPECIFIED: InUse.REFUSE,
    adapters_pb2.IN_USE_POLICY_REFUSE: InUse.REFUSE,
    adapters_pb2.IN_USE_POLICY_WAIT: InUse.WAIT,
    adapters_pb2.IN_USE_POLICY_CANCEL: InUse.CANCEL,
}


class AdapterServicer(adapters_pb2_grpc.AdapterServiceServicer):
    """The manager's calls block on the store, so they run as `StoreCalls`."""

    def __init__(
        self, manager: AdapterManager, merges: Merges, store: StoreCalls, calibrator: Calibrator
    ) -> None:
        self._manager = manager
        self._merges = merges
        self._store = store
        self._calibrator = calibrator

    async def ListAdapters(
        self, request: adapters_pb2.ListAdaptersRequest, context: Any
    ) -> adapters_pb2.ListAdaptersResponse:
        size = request.page_size if request.HasField("page_size") else DEFAULT_PAGE_SIZE
        if not 1 <= size <= MAX_PAGE_SIZE:
            raise InvalidRequestError("page_size", f"must be between 1 and {MAX_PAGE_SIZE}, got {size}")
        after = _read_page_token(request.page_token)
        may_use = current_call().principal.adapters.match
        versions = [
            (name, version)
            for name, version in await self._store.run(self._manager.known)
            if name.startswith(request.name_prefix) and may_use(name)
        ]
        if not request.all_versions:
            versions = list(_newest_and(self._manager.all_in_memory(), versions))
        rest = [version for version in versions if after is None or version > after]
        # The store may have to read what is shown, and nothing else.
        page = await self._store.run(lambda: self._manager.list(rest[:size]))
        return adapters_pb2.ListAdaptersResponse(
            adapters=[convert.adapter(info) for info in page],
            next_page_token=_page_token(*rest[size - 1]) if len(rest) > size else "",
        )

    async def GetAdapter(
        self, request: adapters_pb2.GetAdapterRequest, context: Any
    ) -> adapters_pb2.GetAdapterResponse:
        name, version = await self._named(request)
        info = await self._store.run(lambda: self._manager.get(name, version))
        _tell(info)
        return adapters_pb2.GetAdapterResponse(adapter=convert.adapter(info))

    async def LoadAdapter(
        self, request: adapters_pb2.LoadAdapterRequest, context: Any
    ) -> adapters_pb2.LoadAdapterResponse:
        name, version = await self._named(request)
        before = await self._store.run(lambda: self._manager.get(name, version))
        _tell(before)
        if request.residency not in _BRINGABLE:
            raise InvalidRequestError("residency", "must be RESIDENCY_DEVICE or RESIDENCY_HOST, or absent")
        to_host = request.residency == adapters_pb2.RESIDENCY_HOST
        bring = self._manager.prefetch if to_host else self._manager.load
        started = time.monotonic()
        if to_host and before.residency is not Residency.STORE:
            return adapters_pb2.LoadAdapterResponse(adapter=convert.adapter(before))
        # By its number: a version that is published meanwhile is another one.
        loaded = await self._future(lambda: bring(name, before.ref.version))
        seconds = 0.0 if before.residency is Residency.DEVICE else time.monotonic() - started
        return adapters_pb2.LoadAdapterResponse(adapter=convert.adapter(loaded), load_seconds=seconds)

    async def UnloadAdapter(
        self, request: adapters_pb2.UnloadAdapterRequest, context: Any
    ) -> adapters_pb2.UnloadAdapterResponse:
        name, version = await self._named(request)
        policy = request.in_use
        if policy not in adapters_pb2.InUsePolicy.values():
            raise InvalidRequestError("in_use", f"must be a value of InUsePolicy, got {policy}")
        in_use = _IN_USE[policy]
        resident = self._manager.in_memory(name, version)
        if not resident:
            _tell(await self._store.run(lambda: self._manager.get(name, version)))  # or it is unknown
        running = sum(info.running for info in resident)
        await self._future(lambda: self._manager.unload(name, version, in_use=in_use))
        return adapters_pb2.UnloadAdapterResponse(
            adapters=[convert.adapter(self._manager.describe(info.ref)) for info in resident],
            cancelled_requests=running if in_use is InUse.CANCEL else 0,
        )

    async def PinAdapter(
        self, request: adapters_pb2.PinAdapterRequest, context: Any
    ) -> adapters_pb2.PinAdapterResponse:
        name, version = await self._named(request)
        pinned = await self._future(lambda: self._manager.pin(name, version))
        _tell(pinned)
        return adapters_pb2.PinAdapterResponse(adapter=convert.adapter(pinned))

    async def UnpinAdapter(
        self, request: adapters_pb2.UnpinAdapterRequest, context: Any
    ) -> adapters_pb2.UnpinAdapterResponse:
        name, version = await self._named(request)
        unpinned = self._manager.unpin(name, version)
        if not unpinned and not self._manager.in_memory(name, version):
            _tell(await self._store.run(lambda: self._manager.get(name, version)))  # or it is unknown
        return adapters_pb2.UnpinAdapterResponse(adapters=[convert.adapter(info) for info in unpinned])

    async def MergeAdapter(
        self, request: adapters_pb2.MergeAdapterRequest, context: Any
    ) -> adapters_pb2.MergeAdapterResponse:
        name, version = await self._named(request)
        ref = await self._store.run(lambda: self._manager.resolve(name, version))
        change = await asyncio.wrap_future(self._merges.merge(ref))
        _tell(change.info)
        return adapters_pb2.MergeAdapterResponse(
            adapter=convert.adapter(change.info), merge_seconds=change.seconds
        )

    async def UnmergeAdapter(
        self, request: adapters_pb2.UnmergeAdapterRequest, context: Any
    ) -> adapters_pb2.UnmergeAdapterResponse:
        name, version = await self._named(request)
        change = await asyncio.wrap_future(self._merges.unmerge(name, version))
        _tell(change.info)
        return adapters_pb2.UnmergeAdapterResponse(
            adapter=convert.adapter(change.info), unmerge_seconds=change.seconds
        )

    async def _named(self, request: Any) -> tuple[str, int | None]:
        """Name and version; an alias is what it means now, leaving its canary aside."""
        version = request.version if request.HasField("version") else None
        reference = convert.adapter_reference("name", request.name, version)
        name = current_call().facts["adapter"] = str(reference.name)
        if reference.alias is None:
            return name, reference.version
        ref = await self._store.run(lambda: self._manager.resolve(str(reference), None))
        return name, ref.version

    async def CalibrateMethods(
        self, request: adapters_pb2.CalibrateMethodsRequest, context: Any
    ) -> adapters_pb2.CalibrateMethodsResponse:
        calibration = await asyncio.wrap_future(self._calibrator.calibrate(made_up=not request.only_resident))
        return adapters_pb2.CalibrateMethodsResponse(
            costs=[convert.method_cost(cost) for cost in calibration.costs],
            calibration_seconds=calibration.seconds,
        )

    async def _future(self, begin: Callable[[], Future[T]]) -> T:
        return await asyncio.wrap_future(await self._store.run(begin))


def _tell(info: AdapterInfo) -> None:
    call = current_call()
    call.method = method_label(info.ref.method)
    call.facts["version"] = info.ref.version
    call.digest = info.ref.digest


def _newest_and(
    in_memory: Container[tuple[str, int]], versions: Iterable[tuple[str, int]]
) -> Iterable[tuple[str, int]]:
    for _, group in groupby(versions, key=lambda version: version[0]):
        same_name = list(group)
        yield from (version for version in same_name[:-1] if version in in_memory)
        yield same_name[-1]


def _page_token(name: str, version: int) -> str:
    return base64.urlsafe_b64encode(f"{name}@{version}".encode()).decode()


def _read_page_token(token: str) -> tuple[str, int] | None:
    if not token:
        return None
    try:
        name, _, version = base64.b64decode(token, altchars=b"-_", validate=True).decode().rpartition("@")
        return name, int(version)
    except (binascii.Error, ValueError):
        raise InvalidRequestError("page_token", "must be the next_page_token of the page before") from None
