"""How many replicas a target needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from hotswap_server.fleet.arrivals import draw
from hotswap_server.fleet.costs import Costs
from hotswap_server.fleet.options import Fleet, FleetError, Traffic
from hotswap_server.fleet.simulate import FleetReport, simulate


@dataclass(frozen=True, slots=True)
class Target:
    """95th percentiles in seconds that are not to be exceeded; None sets no bound. Nobody may be refused.

    Raises:
        FleetError: no bound is given, or one is not over 0.
    """

    ttft_p95: float | None = None
    itl_p95: float | None = None

    def __post_init__(self) -> None:
        if self.ttft_p95 is None and self.itl_p95 is None:
            raise FleetError("target", "has no bound; give --ttft-p95, --itl-p95 or both")
        for name in ("ttft_p95", "itl_p95"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise FleetError(name, f"must be a finite number over 0, got {value!r}")

    def met(self, report: FleetReport) -> bool:
        return (
            report.refused == 0
            and (self.ttft_p95 is None or report.ttft.p95 <= self.ttft_p95)
            and (self.itl_p95 is None or not report.itl.p95 > self.itl_p95)
        )


@dataclass(frozen=True, slots=True)
class Needed:
    """The fewest replicas that were found to meet the target, None if no number up to the most tried did.
    `reports` are of all numbers that were tried, the fewest replicas first."""

    replicas: int | None
    reports: tuple[FleetReport, ...]

    @property
    def report(self) -> FleetReport:
        """Of the fewest replicas that meet the target, else of the most that were tried."""
        return next((r for r in self.reports if r.replicas == self.replicas), self.reports[-1])


def replicas_needed(
    costs: Costs,
    fleet: Fleet,
    traffic: Traffic,
    target: Target,
    *,
    max_replicas: int = 128,
    tell: Callable[[int], None] = lambda replicas: None,
) -> Needed:
    """Double the replicas until they meet `target`, then halve the gap; `fleet.replicas` is not looked at.

    More replicas are taken to be no worse. With a ring, whose luck differs from one number to the next, that
    is true by and large.
    """
    if max_replicas < 1:
        raise FleetError("max_replicas", f"must be 1 or more, got {max_replicas}")
    arrivals = draw(traffic)
    reports: dict[int, FleetReport] = {}

    def met(replicas: int) -> bool:
        tell(replicas)
        reports[replicas] = simulate(costs, replace(fleet, replicas=replicas), traffic, arrivals)
        return target.met(reports[replicas])

    low, high = 0, 1  # low is too few
    while not met(high):
        low = high
        if high == max_replicas:
            return Needed(None, _in_order(reports))
        high = min(2 * high, max_replicas)
    while high - low > 1:
        middle = (low + high) // 2
        if met(middle):
            high = middle
        else:
            low = middle
    return Needed(high, _in_order(reports))


def _in_order(reports: dict[int, FleetReport]) -> tuple[FleetReport, ...]:
    return tuple(reports[replicas] for replicas in sorted(reports))
