"""What the last calibration found."""

from __future__ import annotations

import time
from collections.abc import Iterable

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from hotswap_server.engine.calibration import Calibration
from hotswap_server.metrics.labels import method_label

_LABELS = ("method", "path", "batch")


class OverheadCollector(Collector):
    """All series are of the same calibration: a scrape sees one or the next, never a part of each."""

    def __init__(self) -> None:
        self._last: tuple[Calibration, float] | None = None

    def calibrated(self, calibration: Calibration) -> None:
        self._last = calibration, time.time()

    def collect(self) -> Iterable[Metric]:
        ratio = GaugeMetricFamily(
            "hotswap_method_overhead_ratio",
            "Time of a decode step of one method alone, in that of the base; 1 costs nothing.",
            labels=_LABELS,
        )
        seconds = GaugeMetricFamily(
            "hotswap_method_step_seconds", "That step's time, of the base too.", labels=_LABELS
        )
        adapters = GaugeMetricFamily(
            "hotswap_method_calibration_adapters",
            "Distinct adapters in it: on the device, or made up because none was.",
            labels=(*_LABELS, "source"),
        )
        at = GaugeMetricFamily(
            "hotswap_method_calibration_timestamp_seconds", "When that was measured, in Unix time."
        )
        if self._last is not None:
            calibration, when = self._last
            at.add_metric([], when)
            for cost in calibration.costs:
                labels = [method_label(cost.method), cost.path.value, str(cost.batch)]
                ratio.add_metric(labels, cost.ratio)
                seconds.add_metric(labels, cost.step_seconds)
                adapters.add_metric([*labels, "made_up" if cost.made_up else "device"], cost.adapters)
        return ratio, seconds, adapters, at
