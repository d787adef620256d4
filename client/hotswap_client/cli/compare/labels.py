"""Where the labels of a scatter plot go, so that they cover neither one another nor a point."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_LETTER, _LINE, _RADIUS = 5.0, 10.0, 5.5
"""Width of a letter, height of a line, and half a point's size, in points of print."""

_Box = tuple[float, float, float, float]
"""Left, bottom, right, top."""


@dataclass(frozen=True, slots=True)
class Spot:
    """A label beside its point: how far to the right and up, and which of its ends is there."""

    right: float
    up: float
    align: str


_SPOTS = tuple(
    Spot(right, up, align)
    for up in (0, 11, -11, 22, -22, 33, -33)
    for right, align in (
        ((9, "left"), (-9, "right")) if up == 0 else ((0, "center"), (9, "left"), (-9, "right"))
    )
)


def place_labels(points: Sequence[tuple[float, float, str]]) -> list[Spot]:
    """A spot for each of (x, y, label), in points of print: the first that covers least."""
    taken = [(x - _RADIUS, y - _RADIUS, x + _RADIUS, y + _RADIUS) for x, y, _ in points]
    spots = []
    left, right = min(x for x, _, _ in points), max(x for x, _, _ in points)
    for x, y, label in points:

        def covers(spot: Spot, x: float = x, y: float = y, label: str = label) -> float:
            box = _box(x, y, label, spot)
            outside = max(0.0, left - 24 - box[0]) + max(0.0, box[2] - right - 24)
            return sum(_common(box, other) for other in taken) + _LINE * outside

        best = min(_SPOTS, key=covers)
        taken.append(_box(x, y, label, best))
        spots.append(best)
    return spots


def _box(x: float, y: float, label: str, spot: Spot) -> _Box:
    width = _LETTER * len(label)
    start = x + spot.right - {"left": 0.0, "center": width / 2, "right": width}[spot.align]
    return start, y + spot.up - _LINE / 2, start + width, y + spot.up + _LINE / 2


def _common(one: _Box, other: _Box) -> float:
    """The area that two boxes share."""
    across = min(one[2], other[2]) - max(one[0], other[0])
    along = min(one[3], other[3]) - max(one[1], other[1])
    return max(0.0, across) * max(0.0, along)
