"""Whether the engine can be trusted with requests, and a watch over its steps."""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Final

import structlog

FAILURES_IN_A_ROW: Final = 3
"""Steps that fail one after another before the engine counts as broken."""
PROBE_S: Final = 5.0
"""How often an engine that is broken and idle is tried with a request of its own."""

_log = structlog.get_logger(__name__)


class EngineHealth:
    """Broken after three failed steps in a row, or while one is stuck; sound again after a good step.

    `on_change` is called with True or False, on the engine's thread or on the watchdog's.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._failures = 0
        self._began: float | None = None
        self._stuck = False
        self._sound = True
        self.num_failed = 0
        self.num_stuck = 0
        self.on_change: Callable[[bool], None] = lambda sound: None

    @property
    def sound(self) -> bool:
        return self._sound

    def began(self) -> None:
        """The engine looks for work, and does a step if there is any."""
        self._began = self._clock()

    def ended(self, *, good: bool | None) -> None:
        """It has done a step, good or not; None if there was nothing to do."""
        self._began = None
        with self._lock:
            self._stuck = False
            if good is not None:
                self.num_failed += not good
                self._failures = 0 if good else self._failures + 1
        self._tell()

    def seconds_in_step(self) -> float:
        """How long the present step has taken; 0 between steps."""
        began = self._began
        return 0.0 if began is None else self._clock() - began

    def stuck(self) -> bool:
        """The present step takes too long; whether that is news."""
        with self._lock:
            if self._stuck or self._began is None:
                return False
            self._stuck = True
            self.num_stuck += 1
        self._tell()
        return True

    def _tell(self) -> None:
        with self._lock:
            sound = not self._stuck and self._failures < FAILURES_IN_A_ROW
            changed, self._sound = sound is not self._sound, sound
        if changed:
            if sound:
                _log.info("engine_sound")
            else:
                _log.error("engine_broken", steps_failed=self.num_failed, steps_stuck=self.num_stuck)
            self.on_change(sound)


class Watchdog:
    """Reports a step that takes longer than `step_timeout` seconds, and probes an engine that is broken.

    It cannot end a step: what hangs in a kernel or a driver needs a restart, for which health gives the sign.
    """

    def __init__(
        self,
        health: EngineHealth,
        thread: threading.Thread,
        *,
        step_timeout: float,
        probe: Callable[[], None],
        probe_every: float = PROBE_S,
    ) -> None:
        self._health = health
        self._watched = thread
        self._step_timeout = step_timeout
        self._probe = probe
        self._probe_every = probe_every
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="hotswap-watchdog", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _loop(self) -> None:
        pause = min(1.0, self._step_timeout / 4, self._probe_every)
        probed = time.monotonic()
        while not self._stop.wait(pause):
            seconds = self._health.seconds_in_step()
            if seconds > self._step_timeout:
                if self._health.stuck():
                    _log.error("step_stuck", seconds=round(seconds, 1), stack=_stack(self._watched))
            elif not self._health.sound and time.monotonic() - probed >= self._probe_every:
                probed = time.monotonic()
                self._probe()


def _stack(thread: threading.Thread) -> str:
    """Where a thread is, outermost frame first."""
    frame = sys._current_frames().get(thread.ident or -1)
    return "the thread has ended" if frame is None else "".join(traceback.format_stack(frame))
