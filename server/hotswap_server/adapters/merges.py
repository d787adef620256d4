"""Merging at run time: which adapter is in the base's weights, from the request for it to the swap."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import structlog
import torch

from hotswap_server.adapters.manager import AdapterManager
from hotswap_server.adapters.method import MergeableMethod, available_methods
from hotswap_server.adapters.residency import AdapterInfo
from hotswap_server.core import AdapterRef
from hotswap_server.engine.base import BaseModel
from hotswap_server.engine.merging import PreparedMerge, prepare_merge
from hotswap_server.errors import MergeRefusedError

_log = structlog.get_logger(__name__)


MERGE_POLICIES = ("off", "manual", "auto")


@dataclass(frozen=True, slots=True)
class MergeOptions:
    """`policy` is one of MERGE_POLICIES; the rest is for `auto`, see `MergePolicy`."""

    policy: str = "manual"
    share: float = 0.9
    window_s: float = 30.0


@dataclass(frozen=True, slots=True)
class MergeChange:
    """A version after it was merged or unmerged, and the seconds that took; 0 if there was nothing to do."""

    info: AdapterInfo
    seconds: float


class MergeObserver(Protocol):
    """Called after a swap; must be quick."""

    def merged(self, ref: AdapterRef, seconds: float) -> None: ...

    def unmerged(self, ref: AdapterRef) -> None: ...


class BetweenSteps(Protocol):
    """Has something quick done on the engine's thread while no step runs; see `Engine.between_steps`."""

    def __call__(self, action: Callable[[], PreparedMerge | None], /) -> Future[PreparedMerge | None]: ...


class Merges:
    """Merges one adapter at a time; another one takes its place in the same swap.

    The new weights are computed on a thread of its own while requests go on over the old ones, and are
    swapped in between two steps. The merged version keeps its slot, so that its requests go on when it is
    unmerged. Whatever fails leaves the weights as they were.
    """

    def __init__(
        self,
        adapters: AdapterManager,
        base: BaseModel,
        between_steps: BetweenSteps,
        *,
        enabled: bool = True,
        observer: MergeObserver | None = None,
    ) -> None:
        self._adapters = adapters
        self._base = base
        self._between_steps = between_steps
        self._enabled = enabled
        self._observer = observer
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="merge", initializer=_on_one_thread)
        self._worker.submit(lambda: None).result()  # so that this is done before the engine begins

    @property
    def merged(self) -> AdapterRef | None:
        """The version that is in the base's weights."""
        return self._base.merged.ref

    def close(self) -> None:
        """Give up what has not begun, and wait for the rest; the engine must have stopped."""
        self._worker.shutdown(wait=True, cancel_futures=True)

    def merge(self, ref: AdapterRef) -> Future[MergeChange]:
        """Load a version and merge it. Never blocks; the future may fail with what loading raises, too.

        Raises:
            MergeRefusedError: it can never be merged here.
        """
        if not self._enabled:
            raise MergeRefusedError(
                "this server merges nothing; start it with --merge-policy manual or auto", adapter=str(ref)
            )
        if not isinstance(available_methods()[ref.method], MergeableMethod):
            raise MergeRefusedError(
                f"{ref} is a {ref.method} adapter; only LoRA is a change of weights, which can be merged",
                adapter=str(ref),
            )
        return self._worker.submit(self._merge, ref)

    def unmerge(self, name: str, version: int | None = None) -> Future[MergeChange]:
        """Restore the base's weights, bit for bit.

        The future fails with MergeRefusedError if that version, or any of the name, is not merged by then.
        """
        return self._worker.submit(self._unmerge, name, version)

    def _merge(self, ref: AdapterRef) -> MergeChange:
        before = self.merged
        if before == ref:
            return MergeChange(self._adapters.describe(ref), 0.0)
        method = available_methods()[ref.method]
        if not isinstance(method, MergeableMethod):
            raise TypeError(f"{ref.method} does not merge")
        self._adapters.hold(ref, instead_of=before).result()
        try:
            adapter = self._adapters.content(ref).result()
            started = time.monotonic()
            updates = method.updates(adapter)
            self._swap(prepare_merge(ref, updates, self._base))
        except BaseException:
            self._adapters.let_go(ref)
            raise
        seconds = time.monotonic() - started
        if before is not None:
            self._gone(before)
        _log.info("adapter_merged", adapter=str(ref), seconds=round(seconds, 3))
        if self._observer is not None:
            self._observer.merged(ref, seconds)
        return MergeChange(self._adapters.describe(ref), seconds)

    def _unmerge(self, name: str, version: int | None) -> MergeChange:
        ref, started = self.merged, time.monotonic()
        if ref is None or ref.name != name or version not in (None, ref.version):
            asked = name if version is None else f"{name}@{version}"
            # Another adapter may be, but is none of this caller's business.
            instead = f"; {ref} is" if ref is not None and ref.name == name else ""
            raise MergeRefusedError(f"{asked} is not merged{instead}", adapter=asked)
        self._swap(None)
        seconds = time.monotonic() - started
        self._gone(ref)
        return MergeChange(self._adapters.describe(ref), seconds)

    def _swap(self, merge: PreparedMerge | None) -> None:
        # The weights that this replaces are freed here, not on the engine's thread: that takes a while.
        self._between_steps(lambda: self._base.merged.install(merge)).result()

    def _gone(self, ref: AdapterRef) -> None:
        self._adapters.let_go(ref)
        _log.info("adapter_unmerged", adapter=str(ref))
        if self._observer is not None:
            self._observer.unmerged(ref)


def _on_one_thread() -> None:
    """Let torch compute on this thread alone: two teams of threads on the same cores wait for each other.

    The number is one of OpenMP's for every thread, and besides one of the process for threads to come, which
    another thread gives back.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    restorer = threading.Thread(target=torch.set_num_threads, args=(before,))
    restorer.start()
    restorer.join()
