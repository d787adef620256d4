"""From measured times of steps and calls to a cost model, by least squares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from hotswap_server.fleet.costs import StepCosts

_QUANTILES = 200


@dataclass(frozen=True, slots=True)
class Work:
    """What one step did, see `StepCosts`."""

    tokens: int
    rows: int
    adapters: int
    context: float = 0.0
    pairs: float = 0.0


@dataclass(frozen=True, slots=True)
class Observation:
    """All times, in seconds, that were measured for `steps` one after another, within `calls` calls."""

    steps: tuple[Work, ...]
    seconds: tuple[float, ...]
    calls: int = 0

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))


@dataclass(frozen=True, slots=True)
class Fit:
    """`errors` are fitted over measured medians, less one, by observation."""

    step: StepCosts
    call_seconds: float
    errors: tuple[float, ...]


def fit(observations: Sequence[Observation], knots: Sequence[int]) -> Fit:
    """Least squares of relative errors, with no cost below zero.

    Steps cost a piecewise linear function of their tokens that bends at `knots`, the first of which is 1, and
    never falls.
    """
    rows = np.array([_features(observation, knots) for observation in observations])
    measured = np.array([observation.median for observation in observations])
    found = _least_squares(rows / measured[:, None], np.ones(len(measured)))
    fitted = rows @ found
    slopes = found[1 : len(knots)]
    levels = found[0] + np.concatenate(([0.0], np.cumsum(slopes * np.diff(knots))))
    per_row, per_adapter, per_context, per_pair, call = (float(value) for value in found[len(knots) :])
    ratios = np.sort(
        np.concatenate(
            [
                np.array(observation.seconds) / value
                for observation, value in zip(observations, fitted, strict=True)
                if not observation.calls
            ]
        )
    )
    # Middles of bins, so that one outlier is no more than the bin it lies in.
    noise = np.quantile(ratios, (np.arange(_QUANTILES) + 0.5) / _QUANTILES)
    step = StepCosts(
        tokens=tuple(int(knot) for knot in knots),
        seconds=tuple(float(level) for level in levels),
        per_row=per_row,
        per_adapter=per_adapter,
        per_context_token=per_context,
        per_prompt_pair=per_pair,
        noise=tuple(round(float(value), 4) for value in noise),
    )
    return Fit(step, call, tuple(float(e) for e in fitted / measured - 1))


def _features(observation: Observation, knots: Sequence[int]) -> list[float]:
    """What the coefficients are multiplied by: one a step, its tokens between knots, and what is linear."""
    features = [0.0] * (len(knots) + 5)
    for work in observation.steps:
        features[0] += 1.0
        for index, (low, high) in enumerate(pairwise(knots)):
            features[1 + index] += min(max(work.tokens - low, 0), high - low)
        linear = (work.rows, work.adapters, work.context, work.pairs)
        for index, value in enumerate(linear):
            features[len(knots) + index] += value
    features[-1] = observation.calls
    return features


def _least_squares(matrix: NDArray[np.float64], values: NDArray[np.float64]) -> NDArray[np.float64]:
    """With no coefficient below zero: the most negative one is left out until none is."""
    scale = np.linalg.norm(matrix, axis=0)
    kept = [column for column in range(matrix.shape[1]) if scale[column] > 0]
    found = np.zeros(matrix.shape[1])
    while kept:
        scaled = matrix[:, kept] / scale[kept]
        part = np.linalg.lstsq(scaled, values, rcond=None)[0]
        worst = int(np.argmin(part))
        if part[worst] >= 0:
            found[kept] = part / scale[kept]
            break
        del kept[worst]
    return found
