"""The engine as asyncio code sees it: an iterator of events per request."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from typing import Any, Final, TypeVar

from hotswap_server.adapters.auto_merge import AutoMerge
from hotswap_server.adapters.manager import AdapterManager
from hotswap_server.adapters.merges import MergeObserver, MergeOptions, Merges
from hotswap_server.core import Delta, Event, Failed, Finished, GenerateRequest, Scored, ScoreRequest
from hotswap_server.engine.base import BaseModel
from hotswap_server.engine.calibration import Calibration, Calibrator
from hotswap_server.engine.engine import Engine, EngineOptions, EngineStats, deliver
from hotswap_server.engine.graphs import Progress, ignore_progress
from hotswap_server.engine.merge_policy import MergePolicy
from hotswap_server.engine.observer import EngineObserver, SeveralObservers
from hotswap_server.engine.quiet_calibration import QuietCalibration
from hotswap_server.engine.sequence import EventSink
from hotswap_server.errors import OverloadedError

_DRAIN_POLL_S = 0.02
MAX_UNREAD: Final = 2**18
"""Events that all streams together keep for callers who do not read them, each an equal share."""
_LEAST_UNREAD: Final = 256  # of each, however many there are

T = TypeVar("T")


class EngineService:
    """Runs an engine for the event loop that makes it, and closes it with its adapters."""

    def __init__(
        self,
        base: BaseModel,
        tokenizer: Any,
        adapters: AdapterManager,
        options: EngineOptions | None = None,
        *,
        observer: EngineObserver | None = None,
        merging: MergeOptions | None = None,
        merge_observer: MergeObserver | None = None,
        calibration_observer: Callable[[Calibration], None] | None = None,
        calibrate_interval: float = 0.0,
        progress: Progress = ignore_progress,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._num_streams = 0
        merging = merging or MergeOptions()
        self.merges = Merges(
            adapters,
            base,
            self._between_steps,
            enabled=merging.policy != "off",
            observer=merge_observer,
        )
        observers = [] if observer is None else [observer]
        if merging.policy == "auto":
            policy = MergePolicy(share=merging.share, window_s=merging.window_s)
            observers.append(AutoMerge(policy, self.merges))
        self._engine = Engine(
            base,
            tokenizer,
            adapters,
            options,
            post=self._post,
            quarantine=adapters.quarantine,
            observer=SeveralObservers(*observers),
        )
        self.on_health: Callable[[bool], None] = lambda sound: None
        """Called on the event loop when the engine breaks, with False, and when it works again."""
        self._engine.health.on_change = self._health_changed
        self.adapters = adapters
        self.calibrator = Calibrator(self._engine, adapters.lender, self._calibrated)
        self._on_calibration = calibration_observer
        self._quiet = QuietCalibration(
            self.calibrator, lambda: self._engine.idle, interval_s=calibrate_interval
        )
        adapters.on_change = self._engine.wake
        adapters.cancel_users = self._engine.cancel_adapter
        self._engine.record_graphs(progress)
        self._engine.start()
        if calibrate_interval:
            self._quiet.start()

    def _between_steps(self, action: Callable[[], T]) -> Future[T]:
        return self._engine.between_steps(action)

    @property
    def base(self) -> BaseModel:
        return self._engine.base

    @property
    def tokenizer(self) -> Any:
        return self._engine.tokenizer

    @property
    def max_context(self) -> int:
        """Tokens that one request may have, prompt and output together."""
        return self._engine.max_context

    def stats(self) -> EngineStats:
        return self._engine.stats()

    def tenants(self) -> dict[str, tuple[int, int]]:
        """Requests that run and that wait, by tenant, of those that have any."""
        return self._engine.tenants()

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Delta | Finished]:
        """Deltas as they come, then one `Finished`. Leaving the iterator cancels the request.

        Raises:
            HotswapError: what `Engine.submit` raises, or what ended the request.
        """
        events: asyncio.Queue[Event] = asyncio.Queue()
        unread = asyncio.Event()

        def keep(event: Event) -> None:
            share = MAX_UNREAD // max(
                self._num_streams, 1
            )  # the last stream may have left before its last event
            if events.qsize() <= max(share, _LEAST_UNREAD):
                events.put_nowait(event)
            elif not unread.is_set():
                unread.set()
                self._engine.cancel(request.id)

        self._num_streams += 1
        ended = False
        try:
            self._engine.submit(request, keep)
            while not ended:
                event = await events.get()
                if unread.is_set():
                    raise OverloadedError(
                        "the answer is made much faster than it is read; read it as it comes"
                    )
                ended = not isinstance(event, Delta)
                if isinstance(event, Failed):
                    raise event.error
                if isinstance(event, Delta | Finished):
                    yield event
        finally:
            self._num_streams -= 1
            if not ended:
                self._engine.cancel(request.id)

    async def score(self, request: ScoreRequest) -> Scored:
        """The log-probabilities of a text.

        Raises:
            HotswapError: what `Engine.submit` raises, or what ended the request.
        """
        future: asyncio.Future[Event] = self._loop.create_future()
        sink: EventSink = _first_result(future)
        self._engine.submit(request, sink)
        try:
            event = await future
        except asyncio.CancelledError:
            self._engine.cancel(request.id)
            raise
        if isinstance(event, Failed):
            raise event.error
        if not isinstance(event, Scored):
            raise RuntimeError(f"a score ended with {type(event).__name__}")
        return event

    async def drain(self, timeout: float) -> None:
        """Refuse new requests and wait, `timeout` seconds at most, until those inside are done."""
        self._engine.drain()
        deadline = time.monotonic() + timeout
        while not self._engine.idle and time.monotonic() < deadline:
            await asyncio.sleep(_DRAIN_POLL_S)

    def close(self) -> None:
        """End the engine, failing what is left in it with `DrainingError`, and the loading of adapters."""
        self._engine.stop()
        self.calibrator.close()
        self._quiet.close()
        self.merges.close()
        self.adapters.close()

    def _calibrated(self, calibration: Calibration) -> None:
        self._quiet.note(calibration)
        if self._on_calibration is not None:
            self._on_calibration(calibration)

    def _health_changed(self, sound: bool) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(lambda: self.on_health(sound))

    def _post(self, events: list[tuple[EventSink, Event]]) -> None:
        # One call a step: each wakes the loop through a pipe.
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(deliver, events)


def _first_result(future: asyncio.Future[Event]) -> Callable[[Event], None]:
    def settle(event: Event) -> None:
        if not future.done():
            future.set_result(event)

    return settle
