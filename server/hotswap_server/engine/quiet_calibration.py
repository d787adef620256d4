"""Measures again what methods cost while nobody asks for anything."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final

import structlog

from hotswap_server.core import ServingPath
from hotswap_server.engine.calibration import Calibration, Calibrator
from hotswap_server.errors import HotswapError

IDLE_S: Final = 30.0
"""How long nothing must have run before."""

_RETRY_S = 60.0  # after one that was interrupted
_POLL_S = 1.0

_log = structlog.get_logger(__name__)


class QuietCalibration:
    """Calibrates when methods are on the device that were not measured, or after `interval_s`.

    Nothing is made up for it, and a request that comes ends it before the next step.
    """

    def __init__(
        self,
        calibrator: Calibrator,
        idle: Callable[[], bool],
        *,
        interval_s: float,
        idle_s: float = IDLE_S,
        poll_s: float = _POLL_S,
    ) -> None:
        self._calibrator = calibrator
        self._idle = idle
        self._interval_s = interval_s
        self._idle_s = idle_s
        self._poll_s = poll_s
        self._idle_since: float | None = None
        self._measured: set[tuple[str, ServingPath]] = set()
        self._measured_at = self._tried_at = float("-inf")
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="quiet-calibration", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """End it, after `Calibrator.close`."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()

    def note(self, calibration: Calibration) -> None:
        """A calibration has been made, for whatever reason."""
        self._measured = {(cost.method, cost.path) for cost in calibration.costs}
        self._measured_at = time.monotonic()

    def _loop(self) -> None:
        while not self._stopping.wait(self._poll_s):
            try:
                if self._is_time():
                    self._tried_at = time.monotonic()
                    self._calibrator.calibrate(made_up=False, quiet=True).result()
            except HotswapError as error:
                _log.debug("quiet_calibration_ended", reason=str(error))
            except Exception:
                _log.exception("quiet_calibration_failed")

    def _is_time(self) -> bool:
        now = time.monotonic()
        if not self._idle():
            self._idle_since = None
            return False
        if self._idle_since is None:
            self._idle_since = now
        if now - self._idle_since < self._idle_s or now - self._tried_at < min(_RETRY_S, self._interval_s):
            return False
        present = self._calibrator.present()
        return bool(present) and (
            not present <= self._measured or now - self._measured_at >= self._interval_s
        )
