"""What each method costs on this server: homogeneous decode steps beside the base's, on the live model.

In a mixed batch all requests share a step, so their latencies cannot tell. Here a step has rows of one method
alone, between the steps that requests run in. As in `hotswap bench --mix`, a case's ratio is the median of
those to the base's steps just before and after its own.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Final, Protocol

import structlog

from hotswap_server.adapters.lending import Lender
from hotswap_server.core import BASE_METHOD, AdapterRef, ServingPath
from hotswap_server.engine.base import BaseModel
from hotswap_server.engine.chores import Chores
from hotswap_server.engine.step_timer import Row, StepTimer
from hotswap_server.errors import CapacityError, DrainingError, RequestCancelledError

BATCH_SIZES: Final = (1, 8)
CONTEXT: Final = 96
"""Tokens before each row's, as in the middle of a request of `hotswap bench --mix`."""

_ROUNDS = 5
_STEPS = 3  # of a round, after one that warms up

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class MethodCost:
    """`ratio` is the step's time in those of the base at the same batch size, 1 being as quick.

    `adapters` counts the distinct ones in the step, `made_up` says that none was on the device.
    """

    method: str
    path: ServingPath
    batch: int
    ratio: float
    step_seconds: float
    adapters: int
    made_up: bool


@dataclass(frozen=True, slots=True)
class Calibration:
    """Every method that could be measured, the base first, and the seconds that took."""

    costs: tuple[MethodCost, ...]
    seconds: float


class TimedEngine(Protocol):
    """The engine that steps are timed on."""

    base: BaseModel
    chores: Chores

    @property
    def idle(self) -> bool: ...

    @property
    def max_batch_size(self) -> int: ...

    def step_timer(self) -> StepTimer: ...


@dataclass(frozen=True, slots=True)
class _Case:
    """Rows of one method and path. `lent` have slots that stay theirs; `refs` are borrowed for each step."""

    method: str
    path: ServingPath
    refs: tuple[AdapterRef, ...] = ()
    lent: tuple[tuple[AdapterRef, int], ...] = ()

    @property
    def num_adapters(self) -> int:
        return len(self.refs) + len(self.lent)


class _GoneError(Exception):
    """The case cannot be measured now: an adapter has left, or the cache is full."""


class Calibrator:
    """Measures on a thread of its own, one step of the engine at a time.

    `observe` gets every result. A merged adapter is measured merged, and batched as well.
    """

    def __init__(
        self,
        engine: TimedEngine,
        lender: Lender,
        observe: Callable[[Calibration], None] = lambda calibration: None,
    ) -> None:
        self._engine = engine
        self._lender = lender
        self._observe = observe
        self._timer = engine.step_timer()
        self._closed = False
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="calibration")

    def close(self) -> None:
        """End what runs, and wait for it."""
        self._closed = True
        self._worker.shutdown(wait=True, cancel_futures=True)

    def calibrate(self, *, made_up: bool = True, quiet: bool = False) -> Future[Calibration]:
        """Measure every method with adapters on the device, and with `made_up` the others too.

        With `quiet` it gives up between two steps, with RequestCancelledError, when a request comes; it does
        so too when the future is cancelled. CapacityError if the key-value cache has no room for the base's.
        """
        result: Future[Calibration] = Future()

        def run() -> None:
            try:
                calibration = self._measure(result, made_up, quiet)
            except Exception as error:
                if result.set_running_or_notify_cancel():
                    result.set_exception(error)
                return
            self._observe(calibration)
            if result.set_running_or_notify_cancel():
                result.set_result(calibration)

        try:
            self._worker.submit(run)
        except RuntimeError:
            raise DrainingError("the server is shutting down") from None
        return result

    def present(self) -> set[tuple[str, ServingPath]]:
        """What would be measured without made-up adapters, the base not counted."""
        return {(case.method, case.path) for case in self._real_cases()}

    def _real_cases(self) -> Iterator[_Case]:
        on_device = self._lender.on_device()
        for method, refs in on_device.items():
            yield _Case(method, ServingPath.BATCHED, tuple(refs))
        merged = self._engine.base.merged.ref
        if merged is not None:
            yield _Case(merged.method, ServingPath.MERGED, (merged,))

    def _measure(self, result: Future[Calibration], made_up: bool, quiet: bool) -> Calibration:
        started = time.monotonic()

        def step(rows: Callable[[], AbstractContextManager[list[Row]]]) -> float:
            def timed() -> float:
                if quiet and not self._engine.idle:
                    raise RequestCancelledError("a request came before all methods were measured")
                with rows() as these:
                    seconds = self._timer.time(these, context=CONTEXT)
                if seconds is None:
                    raise _GoneError
                return seconds

            if self._closed:
                raise DrainingError("the server is shutting down")
            if result.cancelled():
                raise RequestCancelledError("nobody waits for the calibration any more")
            return self._engine.chores.submit(timed).result()

        batches = sorted({min(size, self._engine.max_batch_size) for size in BATCH_SIZES})
        costs: list[MethodCost] = []
        with ExitStack() as lent:
            cases = [_Case(BASE_METHOD, ServingPath.BASE), *self._real_cases()]
            for method in self._lender.methods if made_up else ():
                if all(case.method != method for case in cases):
                    slots = lent.enter_context(self._lender.made_up(method, batches[-1]))
                    if slots:
                        cases.append(_Case(method, ServingPath.BATCHED, lent=tuple(slots)))
            for batch in batches:
                costs += self._compare(cases, batch, step)
        if not costs:
            raise CapacityError(
                "the key-value cache has no room to measure steps in; try again when fewer requests run"
            )
        costs.sort(key=lambda cost: (cost.method != BASE_METHOD, cost.method, cost.path, cost.batch))
        seconds = time.monotonic() - started
        _log.info("methods_calibrated", cases=len(costs), seconds=round(seconds, 3))
        return Calibration(tuple(costs), seconds)

    def _compare(
        self,
        cases: list[_Case],
        batch: int,
        step: Callable[[Callable[[], AbstractContextManager[list[Row]]]], float],
    ) -> list[MethodCost]:
        """Every case in every round between two runs of the first, the base, which give the round's ratio: a
        machine that slows down for seconds does so for both sides of it."""

        def seconds(case: _Case) -> float:
            steps = [step(lambda: self._rows(case, batch)) for _ in range(_STEPS + 1)]
            return statistics.median(steps[1:])

        plain, *others = cases
        base_seconds: list[float] = []
        pairs: dict[_Case, list[tuple[float, float]]] = {case: [] for case in others}
        try:
            for _ in range(_ROUNDS):
                base_seconds.append(seconds(plain))
                for case in list(pairs):
                    try:
                        own = seconds(case)
                    except _GoneError:
                        del pairs[case]
                        continue
                    base_seconds.append(seconds(plain))
                    pairs[case].append((own, statistics.mean(base_seconds[-2:])))
        except _GoneError:
            return []
        costs = [MethodCost(plain.method, plain.path, batch, 1.0, statistics.median(base_seconds), 0, False)]
        for case, timed in pairs.items():
            costs.append(
                MethodCost(
                    method=case.method,
                    path=case.path,
                    batch=batch,
                    ratio=statistics.median(own / base for own, base in timed),
                    step_seconds=statistics.median(own for own, _ in timed),
                    adapters=min(batch, case.num_adapters),
                    made_up=bool(case.lent),
                )
            )
        return costs

    @contextmanager
    def _rows(self, case: _Case, batch: int) -> Iterator[list[Row]]:
        """A step's rows, each adapter in turn; those of the store cannot leave meanwhile."""
        if case.path is ServingPath.BASE:
            yield [Row()] * batch
            return
        if case.lent:
            yield [Row(*case.lent[row % len(case.lent)]) for row in range(batch)]
            return
        merged = case.path is ServingPath.MERGED
        if merged and self._engine.base.merged.ref != case.refs[0]:
            raise _GoneError
        refs = spread(case.refs, batch)
        borrowed: list[Row] = []
        try:
            for ref in refs:
                slot = self._lender.borrow(ref)
                if slot is None:
                    raise _GoneError
                borrowed.append(Row(ref, slot, merged))
            yield [borrowed[row % len(borrowed)] for row in range(batch)]
        finally:
            for row in borrowed:
                if row.adapter is not None:
                    self._lender.release(row.adapter)


def spread(refs: Sequence[AdapterRef], count: int) -> list[AdapterRef]:
    """Up to `count` of `refs`, evenly: of one the middle one, of all every one."""
    count = min(count, len(refs))
    return [refs[(2 * index + 1) * len(refs) // (2 * count)] for index in range(count)]
