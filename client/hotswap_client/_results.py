"""What calls return: frozen values, free of protobuf."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum


class FinishReason(StrEnum):
    """Why a generation stopped."""

    STOP_TOKEN = "stop_token"  # an end-of-sequence or requested stop token
    STOP_STRING = "stop_string"
    LENGTH = "length"  # max_new_tokens or the context's length
    UNKNOWN = "unknown"  # something this client is too old to know


class ServingPath(StrEnum):
    """How a request ran."""

    BASE = "base"
    BATCHED = "batched"
    MERGED = "merged"
    UNKNOWN = "unknown"


class Residency(StrEnum):
    """The nearest place to the model that holds an adapter."""

    STORE = "store"
    HOST = "host"
    DEVICE = "device"
    UNKNOWN = "unknown"


class InUsePolicy(StrEnum):
    """What an unload does about requests that use the adapter."""

    REFUSE = "refuse"
    WAIT = "wait"
    CANCEL = "cancel"


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """The token at one position and its natural log-probability; `top` holds the best (id, logprob) pairs."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds spent waiting for a place, waiting for the adapter, reading the input, producing tokens."""

    queue: float
    load: float
    prefill: float
    decode: float

    @property
    def total(self) -> float:
        return self.queue + self.load + self.prefill + self.decode


@dataclass(frozen=True, slots=True)
class Usage:
    """Counts of tokens: of the input, and new ones (a final end-of-sequence token included)."""

    prompt_tokens: int
    generated_tokens: int


@dataclass(frozen=True, slots=True)
class GenerateResult:
    """A whole completion. `adapter`, `version` and `digest` are None and `method` is `none` for the base."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    adapter: str | None
    version: int | None
    digest: str | None
    method: str
    path: ServingPath
    usage: Usage
    timings: Timings
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class StreamDelta:
    """New output of a running generation. The last one is empty but for `result`, the whole completion."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    result: GenerateResult | None = None


@dataclass(frozen=True, slots=True)
class ScoreResult:
    """Log-probabilities of a given text, one entry for each scored token, and their sum."""

    logprobs: tuple[TokenLogprob, ...]
    total_logprob: float
    adapter: str | None
    version: int | None
    digest: str | None
    method: str
    path: ServingPath
    usage: Usage
    timings: Timings


@dataclass(frozen=True, slots=True)
class TokenizeResult:
    """The tokens of an input, special tokens included."""

    token_ids: tuple[int, ...]
    count: int


@dataclass(frozen=True, slots=True)
class Adapter:
    """One version of an adapter. `method_config` holds the method's settings, such as `r`, as JSON values;
    `digest` is empty and `num_parameters` 0 until the server has read the content. `error` says why it cannot
    be served, if that is known."""

    name: str
    version: int
    digest: str
    method: str
    size_bytes: int
    num_parameters: int
    method_config: Mapping[str, object]
    residency: Residency
    pinned: bool
    merged: bool
    running_requests: int
    error: str = ""


@dataclass(frozen=True, slots=True)
class AdapterTransition:
    """An adapter after it was loaded, merged or unmerged, and the seconds that took."""

    adapter: Adapter
    seconds: float


@dataclass(frozen=True, slots=True)
class MethodCost:
    """A decode step of one method alone: `overhead_ratio` is its time in that of the base, 1 costing nothing.

    `method` is `none` for the base; `adapters` counts the distinct ones in the step, which were `made_up`
    where none was on the device.
    """

    method: str
    path: ServingPath
    batch_size: int
    overhead_ratio: float
    step_seconds: float
    adapters: int
    made_up: bool


@dataclass(frozen=True, slots=True)
class UnloadResult:
    """The versions that left memory, and how many requests were cancelled for it."""

    adapters: tuple[Adapter, ...]
    cancelled_requests: int
