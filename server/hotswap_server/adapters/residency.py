"""The nouns of an adapter's place in memory, for the manager and for those who ask it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, StrEnum, auto
from typing import Protocol

from hotswap_server.core import AdapterRef


class Residency(StrEnum):
    """The nearest place that holds an adapter."""

    STORE = "store"
    HOST = "host"
    DEVICE = "device"


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """One version and where it is. Sizes are known once it has been loaded; `error` says why it cannot be."""

    ref: AdapterRef
    residency: Residency
    nbytes: int
    num_parameters: int
    pinned: bool
    running: int
    details: Mapping[str, str]
    error: str | None = None
    merged: bool = False


@dataclass(frozen=True, slots=True)
class SlotStats:
    """The slots of one method: taken ones and all, how many are pinned, and adapters on their way to one.

    `swaps` counts adapters that had to leave for another; `bank_bytes` is what all slots can come to take.
    """

    taken: int
    total: int
    pinned: int
    underway: int
    swaps: int = 0
    bank_bytes: int = 0


@dataclass(frozen=True, slots=True)
class HostStats:
    """What host memory holds of adapters, and how often they were looked for there."""

    bytes: int
    budget_bytes: int
    adapters: int
    hits: int
    misses: int


@dataclass(frozen=True, slots=True)
class ResidentAdapter:
    """A version in host memory or on the device; one that is in both is told of twice."""

    ref: AdapterRef
    tier: Residency
    nbytes: int


class InUse(Enum):
    """What unloading does to the requests that use the adapter."""

    REFUSE = auto()  # nothing is unloaded
    WAIT = auto()
    CANCEL = auto()


@dataclass(frozen=True, slots=True)
class LoadRecord:
    """One adapter that has come to the device, `seconds` after it was first asked for.

    `slot_seconds` of them it lay in host memory and waited for a slot.
    """

    ref: AdapterRef
    seconds: float
    slot_seconds: float


class AdapterObserver(Protocol):
    """Called as adapters move; must be quick."""

    def loaded(self, record: LoadRecord) -> None: ...

    def retried(self, ref: AdapterRef, error: Exception) -> None:
        """The store failed and is asked again."""
        ...

    def failed(self, ref: AdapterRef, error: Exception) -> None: ...

    def evicted(self, ref: AdapterRef, tier: Residency) -> None:
        """It left host memory or the device, by an unload too."""
        ...


class NullAdapterObserver:
    """Measures nothing."""

    def loaded(self, record: LoadRecord) -> None: ...

    def retried(self, ref: AdapterRef, error: Exception) -> None: ...

    def failed(self, ref: AdapterRef, error: Exception) -> None: ...

    def evicted(self, ref: AdapterRef, tier: Residency) -> None: ...
