"""Times of answers, each subject's beside the base's in rounds: only ratios within a round can be trusted."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

from hotswap_client import AsyncClient
from hotswap_client.cli.compare.options import CompareError, Measuring

BASE = "base"
_WARM_UP_TOKENS = 4


@dataclass(frozen=True, slots=True)
class Subject:
    """What is measured: an adapter of a server, merged into its base or not; None: the base itself."""

    name: str
    client: AsyncClient
    adapter: str | None = None
    merged: bool = False


@dataclass(frozen=True, slots=True)
class Burst:
    """Requests that were sent at once. Seconds to the first token of each, between tokens, and of it all."""

    first: tuple[float, ...]
    gaps: tuple[float, ...]
    tokens: int
    seconds: float
    path: str

    def as_json(self) -> dict[str, Any]:
        return {
            "first": [round(value, 5) for value in self.first],
            "gaps": [round(value, 5) for value in self.gaps],
            "tokens": self.tokens,
            "seconds": round(self.seconds, 5),
            "path": self.path,
        }

    @classmethod
    def of_json(cls, value: Mapping[str, Any]) -> Burst:
        return cls(
            tuple(value["first"]), tuple(value["gaps"]), value["tokens"], value["seconds"], value["path"]
        )


Round = Mapping[str, Mapping[int, Sequence[Burst]]]
"""Bursts by subject and batch size. The base is measured twice, at both ends."""


@dataclass(frozen=True, slots=True)
class Percentiles:
    """The median and the 95th percentile, in seconds."""

    p50: float
    p95: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Percentiles:
        ordered = sorted(values)
        return cls(median(ordered), ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))])


@dataclass(frozen=True, slots=True)
class Overhead:
    """A share over the base: the median of the rounds' ratios less one, and their quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, ratios: Sequence[float]) -> Overhead:
        ordered = sorted(ratios)
        last = len(ordered) - 1
        return cls(median(ordered) - 1, ordered[round(last / 4)] - 1, ordered[round(3 * last / 4)] - 1)


@dataclass(frozen=True, slots=True)
class Latency:
    """A subject at one batch size. Times are in seconds, the throughput is of all requests together."""

    batch_size: int
    first_token: Percentiles
    between_tokens: Percentiles
    tokens_per_second: float
    first_token_overhead: Overhead
    between_tokens_overhead: Overhead
    path: str


async def measure_round(
    subjects: Sequence[Subject],
    prompts: Sequence[Sequence[int]],
    measuring: Measuring,
    seed: str,
    done: Callable[[], None] = lambda: None,
) -> Round:
    """One round: the base, the others in an order of `seed`, those to be merged, and the base again.

    Raises:
        CompareError: a subject was not served as it was to be.
    """
    base = next(subject for subject in subjects if subject.name == BASE)
    plain = [subject for subject in subjects if not subject.merged and subject is not base]
    random.Random(seed).shuffle(plain)
    found: dict[str, dict[int, list[Burst]]] = {}

    async def measure(subject: Subject) -> None:
        for size in measuring.batch_sizes:
            burst = await send(subject, prompts[:size], measuring.new_tokens)
            if (burst.path == "merged") != subject.merged:
                raise CompareError(f"{subject.name} was served on the path {burst.path}; please report it")
            found.setdefault(subject.name, {}).setdefault(size, []).append(burst)
        done()

    for subject in (base, *plain):
        await measure(subject)
    for subject in subjects:
        if subject.merged:
            async with _merged(subject):
                await send(subject, prompts[:1], _WARM_UP_TOKENS)
                await measure(subject)
    await measure(base)
    return found


async def warm_up(subjects: Sequence[Subject], prompts: Sequence[Sequence[int]]) -> None:
    """Bring every adapter to the device, and let each subject's code run once at each size."""
    for subject in subjects:
        if subject.adapter is not None:
            await subject.client.adapters.load(subject.adapter)
        if not subject.merged:
            await send(subject, prompts, _WARM_UP_TOKENS)


async def send(subject: Subject, prompts: Sequence[Sequence[int]], new_tokens: int) -> Burst:
    """Send all prompts at once and take the times at which tokens come."""
    started = time.perf_counter()
    answers = await asyncio.gather(*(_stream(subject, prompt, new_tokens) for prompt in prompts))
    seconds = time.perf_counter() - started
    return Burst(
        first=tuple(times[0] - started for times, _, _ in answers),
        gaps=tuple(later - earlier for times, _, _ in answers for earlier, later in pairwise(times)),
        tokens=sum(count for _, count, _ in answers),
        seconds=seconds,
        path=answers[0][2],
    )


def summarise(rounds: Sequence[Round], name: str, size: int) -> Latency:
    """A subject's figures over all rounds, and what it takes over the base of the same round."""
    bursts = [burst for measured in rounds for burst in measured[name][size]]
    return Latency(
        batch_size=size,
        first_token=Percentiles.of([value for burst in bursts for value in burst.first]),
        between_tokens=Percentiles.of([value for burst in bursts for value in burst.gaps]),
        tokens_per_second=median(burst.tokens / burst.seconds for burst in bursts),
        first_token_overhead=_overhead(rounds, name, size, lambda burst: burst.first),
        between_tokens_overhead=_overhead(rounds, name, size, lambda burst: burst.gaps),
        path=bursts[-1].path,
    )


def round_as_json(measured: Round) -> dict[str, Any]:
    return {
        name: {str(size): [burst.as_json() for burst in bursts] for size, bursts in sizes.items()}
        for name, sizes in measured.items()
    }


def round_of_json(value: Mapping[str, Any]) -> Round:
    return {
        name: {int(size): [Burst.of_json(burst) for burst in bursts] for size, bursts in sizes.items()}
        for name, sizes in value.items()
    }


def _overhead(
    rounds: Sequence[Round], name: str, size: int, times: Callable[[Burst], Sequence[float]]
) -> Overhead:
    def typical(measured: Round, subject: str) -> float:
        return _typical([times(burst) for burst in measured[subject][size]])

    return Overhead.of([typical(measured, name) / typical(measured, BASE) for measured in rounds])


def _typical(times: Sequence[Sequence[float]]) -> float:
    """The mean of bursts' medians: the base's two ends of a round count alike."""
    return sum(median(values) for values in times) / len(times)


async def _stream(subject: Subject, prompt: Sequence[int], new_tokens: int) -> tuple[list[float], int, str]:
    times: list[float] = []
    stream = subject.client.stream(
        adapter=subject.adapter,
        token_ids=prompt,
        max_new_tokens=new_tokens,
        temperature=0.0,
        ignore_eos=True,
    )
    async with stream as deltas:
        async for delta in deltas:
            if delta.token_ids:
                times.append(time.perf_counter())
    if stream.result is None:
        raise CompareError(f"the server ended an answer of {subject.name} too early; try again")
    return times, stream.result.usage.generated_tokens, str(stream.result.path)


@asynccontextmanager
async def _merged(subject: Subject) -> AsyncIterator[None]:
    adapter = subject.adapter or ""
    await subject.client.adapters.merge(adapter)
    try:
        yield
    finally:
        await subject.client.adapters.unmerge(adapter)
