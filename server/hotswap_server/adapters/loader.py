"""Loader threads: bring an adapter from the store into host memory while the engine goes on decoding."""

from __future__ import annotations

import queue
import random
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import structlog

from hotswap_server.adapters.checkpoint import RawCheckpoint
from hotswap_server.adapters.failures import FailureMemory
from hotswap_server.adapters.host_cache import HostCache
from hotswap_server.core import AdapterRef
from hotswap_server.errors import DrainingError, HotswapError, OverloadedError, StoreUnavailableError

logger = structlog.get_logger(__name__)

_MAX_ABANDONED = 32  # threads in reads that hang
_CLOSE_TIMEOUT_S = 5.0


class HostAdapter(Protocol):
    """A checked adapter in host memory."""

    @property
    def nbytes(self) -> int: ...

    @property
    def method(self) -> str: ...


class ReadableStore(Protocol):
    """What the loader needs of `AdapterStore`."""

    def read(self, ref: AdapterRef) -> RawCheckpoint: ...


H = TypeVar("H", bound=HostAdapter)


@dataclass(eq=False, slots=True)
class _Job(Generic[H]):
    ref: AdapterRef
    deadline: float
    future: Future[H] = field(default_factory=Future)
    begun: bool = False
    replaced: bool = False  # its thread hangs, and another one does the work


class Loader(Generic[H]):
    """Loads adapters on `workers` threads and keeps them in `cache`, each digest once at a time.

    A load waits, is read and is parsed within `deadline_s` seconds, or fails; a thread whose read hangs for
    longer is replaced. A `transient` error is retried, up to `retries` times, after `backoff_s`, twice that,
    and so on, each shortened at random by up to half. After a failure the same digest fails at once, without
    another look at the store: for `negative_ttl_s` seconds when the adapter is invalid or too large, for
    `unavailable_ttl_s` when storage failed. `on_retry` is called on a loader thread before each pause.

    A future's callbacks run on a loader thread, on the deadline thread, or, when the answer is there already,
    on the thread that adds them. They must be short: a loader thread loads nothing meanwhile.
    """

    def __init__(
        self,
        store: ReadableStore,
        cache: HostCache[H],
        parse: Callable[[RawCheckpoint], H],
        *,
        workers: int = 2,
        deadline_s: float = 60.0,
        retries: int = 3,
        backoff_s: float = 0.2,
        negative_ttl_s: float = 10.0,
        unavailable_ttl_s: float = 1.0,
        on_retry: Callable[[AdapterRef, Exception], None] = lambda ref, error: None,
    ) -> None:
        self._store = store
        self._cache = cache
        self._parse = parse
        self._deadline_s = deadline_s
        self._retries = retries
        self._backoff_s = backoff_s
        self._on_retry = on_retry
        self._failures = FailureMemory(negative_ttl_s, unavailable_ttl_s)
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._queue: queue.SimpleQueue[_Job[H] | None] = queue.SimpleQueue()
        self._jobs: dict[str, _Job[H]] = {}  # unanswered, by digest
        self._deadlines: deque[_Job[H]] = deque()  # all have the same time to live: first in, first due
        self._deadline_added = threading.Condition(self._lock)
        self._workers: list[threading.Thread] = []
        self._num_abandoned = 0
        self._watcher = threading.Thread(target=self._watch, name="adapter-loader-deadline", daemon=True)
        self._watcher.start()
        with self._lock:
            for _ in range(workers):
                self._add_worker()

    def load(self, ref: AdapterRef) -> Future[H]:
        """The adapter, from host memory or soon from the store. Never blocks.

        The future cannot be cancelled, since others may wait for it. It fails with AdapterNotFoundError,
        AdapterInvalidError, StoreUnavailableError (after all retries, or at the deadline), CapacityError (the
        adapter is larger than the whole cache), DrainingError (closed), or what `parse` raises.
        Where the cache is full of adapters in use, the future gets the adapter and the cache does not.
        """
        with self._lock:
            if self._closing.is_set():
                return _answered(DrainingError("the server is shutting down and loads no adapters"))
            # Under the lock: between a miss and the look at the jobs, no load may end.
            if (cached := self._cache.get(ref.digest)) is not None:
                return _answered(cached)
            if (failure := self._failures.recall(ref.digest)) is not None:
                return _answered(failure)
            if (job := self._jobs.get(ref.digest)) is None:
                job = _Job(ref, time.monotonic() + self._deadline_s)
                job.future.set_running_or_notify_cancel()
                self._jobs[ref.digest] = job
                self._deadlines.append(job)
                self._deadline_added.notify()
                self._queue.put(job)
            return job.future

    def forget_failure(self, digest: str) -> None:
        """Let the next `load` of a digest look at the store again, whatever was found before."""
        self._failures.forget(digest)

    def failure(self, digest: str) -> HotswapError | None:
        """What a load of this digest would fail with at once."""
        return self._failures.recall(digest)

    def close(self) -> None:
        """Fail what is unanswered with DrainingError and end the threads.

        Returns within seconds: a thread whose read hangs is left to itself.
        """
        with self._lock:
            self._closing.set()
            unanswered = list(self._jobs.values())
            workers = list(self._workers)
            self._deadline_added.notify()
        for job in unanswered:
            self._answer(job, DrainingError("the server is shutting down and loads no adapters"))
        for _ in workers:
            self._queue.put(None)
        until = time.monotonic() + _CLOSE_TIMEOUT_S
        for thread in (*workers, self._watcher):
            if thread is not threading.current_thread():
                thread.join(max(0.0, until - time.monotonic()))

    def _add_worker(self) -> None:
        """With the lock held."""
        # Daemons: a read that hangs in a file system must not keep the process from ending.
        name = f"adapter-loader-{len(self._workers)}"
        worker = threading.Thread(target=self._work, name=name, daemon=True)
        self._workers.append(worker)
        worker.start()

    def _work(self) -> None:
        while (job := self._queue.get()) is not None:
            if self._begin(job):
                self._answer(job, self._load(job))
            with self._lock:
                if job.replaced:
                    self._num_abandoned -= 1
                    self._workers.remove(threading.current_thread())
                    return

    def _begin(self, job: _Job[H]) -> bool:
        with self._lock:
            unanswered = self._jobs.get(job.ref.digest) is job
            job.begun = unanswered and time.monotonic() < job.deadline
            return job.begun

    def _replace_worker(self, job: _Job[H]) -> None:
        """Have another thread for the one that hangs in `job`."""
        with self._lock:
            if job.begun and self._jobs.get(job.ref.digest) is job and self._num_abandoned < _MAX_ABANDONED:
                job.replaced = True
                self._num_abandoned += 1
                self._add_worker()

    def _load(self, job: _Job[H]) -> H | Exception:
        try:
            adapter = self._parse(self._read(job))
            try:
                self._cache.put(job.ref.digest, adapter, adapter.nbytes)
            except OverloadedError as error:
                logger.warning("adapter_not_cached", adapter=str(job.ref), error=str(error))
            return adapter
        except Exception as error:  # whatever it is belongs to the waiters, and the thread lives on
            self._failures.remember(job.ref.digest, error)
            return error

    def _read(self, job: _Job[H]) -> RawCheckpoint:
        attempt = 0
        while True:
            try:
                return self._store.read(job.ref)
            except HotswapError as error:
                pause = self._backoff_s * 2**attempt * random.uniform(0.5, 1.0)
                if not error.transient or attempt == self._retries or not self._is_unanswered(job):
                    raise
                self._on_retry(job.ref, error)
                logger.warning("store_read_retry", adapter=str(job.ref), pause_s=pause, error=str(error))
                self._closing.wait(pause)
                attempt += 1

    def _watch(self) -> None:
        while True:
            with self._lock:
                while (
                    self._deadlines
                    and self._jobs.get(self._deadlines[0].ref.digest) is not self._deadlines[0]
                ):
                    self._deadlines.popleft()  # answered in time
                if self._closing.is_set():
                    return
                now = time.monotonic()
                if not self._deadlines or self._deadlines[0].deadline > now:
                    self._deadline_added.wait(self._deadlines[0].deadline - now if self._deadlines else None)
                    continue
                job = self._deadlines.popleft()
            late = StoreUnavailableError(
                f"{job.ref} was not loaded within {self._deadline_s:g} s; retry later", adapter=str(job.ref)
            )
            self._replace_worker(job)
            self._failures.remember(job.ref.digest, late)
            self._answer(job, late)

    def _is_unanswered(self, job: _Job[H]) -> bool:
        with self._lock:
            return self._jobs.get(job.ref.digest) is job

    def _answer(self, job: _Job[H], result: H | Exception) -> None:
        """Complete the future once; a load that ends after its deadline has only filled the cache."""
        with self._lock:
            if self._jobs.get(job.ref.digest) is not job:
                return
            del self._jobs[job.ref.digest]
        _complete(job.future, result)


def _answered(result: H | Exception) -> Future[H]:
    future: Future[H] = Future()
    future.set_running_or_notify_cancel()
    _complete(future, result)
    return future


def _complete(future: Future[H], result: H | Exception) -> None:
    if isinstance(result, Exception):
        future.set_exception(result)
    else:
        future.set_result(result)
