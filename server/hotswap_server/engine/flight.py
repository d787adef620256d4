"""Steps that were launched and have not given their tokens yet: the device computes, the host goes on."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import structlog
import torch

from hotswap_server.engine.ahead import Choice
from hotswap_server.engine.batch import BatchBuilder
from hotswap_server.engine.collector import Collector
from hotswap_server.engine.merging import MergedWeights
from hotswap_server.engine.runner import ModelRunner
from hotswap_server.engine.scheduler import Scheduled
from hotswap_server.errors import EngineError

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Flight:
    """A launched step: its logits or, where nobody wants more, the tokens that it chooses.

    `rows` are the entries' among these, None for one that gives no token.
    """

    batch: list[Scheduled]
    rows_per_entry: list[int]
    rows: list[int | None]
    logits: torch.Tensor | None
    choice: Choice | None
    launched: float


class Flights:
    """Launches steps and hands out what they gave; a step that raises fails its sequences and no others.

    With `ahead` a step that chooses its tokens itself is still underway when `advance` returns, and the next
    one is launched behind it. Without, and with any other step, `advance` waits for it. `landed` is told the
    entries that a step was not in vain for, since they had not ended before, and its seconds, those not
    counted in which it stood behind another one.
    """

    def __init__(
        self,
        builder: BatchBuilder,
        runner: ModelRunner,
        collector: Collector,
        merged: MergedWeights,
        landed: Callable[[list[Scheduled], float], None],
        *,
        ahead: bool,
    ) -> None:
        self._builder = builder
        self._runner = runner
        self._collector = collector
        self._merged = merged
        self._on_landed = landed
        self.ahead = ahead
        self._flight: Flight | None = None
        self._landed = 0.0
        self._results: list[bool] = []

    @property
    def underway(self) -> bool:
        return self._flight is not None

    def take_results(self) -> list[bool]:
        """Whether the steps that ended since the last call went well."""
        results, self._results = self._results, []
        return results

    def advance(self, batch: list[Scheduled]) -> None:
        """Launch a step of `batch`, if that is not empty, then hand out what the one before gave."""
        before, self._flight = self._flight, None
        failed = False
        if batch:
            try:
                self._flight = self._launch(batch)
            except Exception:
                _log.exception("step_failed", batch_size=len(batch))
                failed = True
        if before is not None:
            self._land(before)
        if failed:
            self._fail(batch)
        if self._flight is not None and self._flight.choice is None:
            self.settle()

    def settle(self) -> None:
        """Let no step be underway."""
        if (flight := self._flight) is not None:
            self._flight = None
            self._land(flight)

    def abandon(self) -> None:
        """Forget the step that is underway, all of whose sequences have ended, and count a failed one."""
        self._flight = None
        self._results.append(False)

    def _launch(self, batch: list[Scheduled]) -> Flight:
        launched, merged = time.perf_counter(), self._merged.ref
        for entry in batch:
            entry.sequence.merged = merged is not None and entry.sequence.request.adapter == merged
        inputs = self._builder.build(batch)
        rows = [
            row if count and not entry.sequence.is_score else None
            for entry, count, row in zip(batch, inputs.rows_per_entry, inputs.chosen_at, strict=True)
        ]
        logits = choice = None
        if self.ahead and _chooses(batch, rows):
            choice = self._runner.choose(inputs)
        else:
            logits = self._runner.run(inputs)
        # From now on its tokens count as computed, and as pending those that it will give.
        for entry, row in zip(batch, rows, strict=True):
            entry.sequence.launched(entry.num_new, row)
        return Flight(batch, inputs.rows_per_entry, rows, logits, choice, launched)

    def _land(self, flight: Flight) -> None:
        used = [entry for entry in flight.batch if not entry.sequence.ended]
        try:
            if flight.choice is not None:
                self._collector.collect_chosen(flight.batch, flight.rows, flight.choice.wait())
            elif flight.logits is not None:
                self._collector.collect(flight.batch, flight.rows_per_entry, flight.logits)
        except Exception:
            _log.exception("step_failed", batch_size=len(flight.batch))
            self._fail(flight.batch)
            return
        began, self._landed = max(flight.launched, self._landed), time.perf_counter()
        self._results.append(True)
        if used:
            self._on_landed(used, self._landed - began)

    def _fail(self, batch: list[Scheduled]) -> None:
        self._results.append(False)
        error = EngineError("the engine failed while it computed this request; see the server's log")
        for entry in batch:
            if not entry.sequence.ended:
                self._collector.fail(entry.sequence, error)


def _chooses(batch: list[Scheduled], rows: list[int | None]) -> bool:
    """Whether the likeliest tokens are all that anyone wants of a step."""
    return all(
        entry.sequence.plain or (row is None and not entry.sequence.is_score)
        for entry, row in zip(batch, rows, strict=True)
    )
