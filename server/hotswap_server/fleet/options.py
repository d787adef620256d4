"""What is simulated: the replicas and what they are asked."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Final, Literal

AFFINITIES: Final = ("ring", "round-robin")
PAGE_TOKENS: Final = 16

Affinity = Literal["ring", "round-robin"]


class FleetError(ValueError):
    """Something given to the model is wrong. The message is one line that names the field and the remedy."""

    def __init__(self, field: str, why: str) -> None:
        super().__init__(f"{field}: {why}")
        self.field = field


@dataclass(frozen=True, slots=True)
class Fleet:
    """Replicas of one server, each with the limits that `hotswap serve` has flags for.

    `affinity` ring sends an adapter's requests to one replica, by consistent hashing over a ring of at least
    `ring_size` entries, gRPC's and Envoy's default being 1024; round-robin sends them in turn.
    `kv_tokens` is what a replica's key-value cache holds; None sets no limit. `store_latency` is added to the
    measured time of every load, in seconds, for a store that is farther away than the measured one.

    Raises:
        FleetError: a number is out of range.
    """

    replicas: int = 1
    adapter_slots: int = 16
    host_cache_bytes: int = 1 << 30
    load_workers: int = 2
    max_batch_size: int = 64
    max_batch_tokens: int = 512
    kv_tokens: int | None = None
    max_queue: int = 1024
    affinity: Affinity = "ring"
    ring_size: int = 1024
    store_latency: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "affinity":
                if value not in AFFINITIES:
                    raise FleetError("affinity", f"must be one of {', '.join(AFFINITIES)}, got {value!r}")
            elif field.name == "store_latency":
                _require("store_latency", value, at_least=0.0)
            elif not (field.name == "kv_tokens" and value is None):
                _require(field.name, value, at_least=1)
        if self.max_batch_tokens < self.max_batch_size:
            raise FleetError(
                "max_batch_tokens",
                f"must be max_batch_size ({self.max_batch_size}) or more, got {self.max_batch_tokens}: the "
                "model has every running request decode at every step",
            )


@dataclass(frozen=True, slots=True)
class Traffic:
    """Poisson arrivals at `rate` requests per second to all replicas together, for `seconds`.

    The adapter of rank k is asked for in proportion to k^-`zipf`; 0 is uniform. Prompts and outputs have
    `prompt_tokens` and `output_tokens` in the mean; `length_cv` is the coefficient of variation of their
    log-normal distributions, 0 making all alike. What arrives in the first `warmup` seconds is not counted.
    Replicas start `warm`, as if all adapters had been asked for once, the most popular last; or empty.

    Raises:
        FleetError: a number is out of range.
    """

    rate: float
    adapters: int = 100
    zipf: float = 1.0
    prompt_tokens: int = 256
    output_tokens: int = 128
    length_cv: float = 0.0
    seconds: float = 120.0
    warmup: float = 20.0
    warm: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rate", "seconds"):
            _require(name, getattr(self, name), over=0.0)
        for name in ("zipf", "length_cv", "warmup", "seed"):
            _require(name, getattr(self, name), at_least=0.0)
        for name in ("adapters", "prompt_tokens", "output_tokens"):
            _require(name, getattr(self, name), at_least=1)
        if self.warmup >= self.seconds:
            raise FleetError("warmup", f"must be less than seconds ({self.seconds:g}), got {self.warmup:g}")
        if self.rate * self.seconds > MAX_REQUESTS:
            raise FleetError(
                "seconds",
                f"{self.rate:g} requests/s for {self.seconds:g} s are more than the {MAX_REQUESTS} that one "
                "simulation takes; simulate a shorter time",
            )


MAX_REQUESTS: Final = 5_000_000


def _require(name: str, value: float, *, at_least: float | None = None, over: float | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise FleetError(name, f"must be a finite number, got {value!r}")
    if at_least is not None and value < at_least:
        raise FleetError(name, f"must be {at_least:g} or more, got {value:g}")
    if over is not None and value <= over:
        raise FleetError(name, f"must be over {over:g}, got {value:g}")
