"""The nouns that every layer of the server shares."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from hotswap_server.errors import InvalidRequestError

BASE_METHOD = "none"
"""`method` of a request without an adapter."""

MAX_TOP_LOGPROBS = 20
MAX_STOP_STRINGS = 16


class FinishReason(StrEnum):
    """Why a request stopped."""

    STOP_TOKEN = "stop_token"  # an end-of-sequence or requested stop token
    STOP_STRING = "stop_string"
    LENGTH = "length"  # max_new_tokens or the context limit


class ServingPath(StrEnum):
    """How a request ran."""

    BASE = "base"
    BATCHED = "batched"
    MERGED = "merged"


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """One immutable version of an adapter: `name` is `tenant/name`, `digest` the content's SHA-256 in hex."""

    name: str
    version: int
    digest: str
    method: str

    def __str__(self) -> str:
        return f"{self.name}@{self.version}"

    @property
    def tenant(self) -> str:
        return self.name.partition("/")[0]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose a request's tokens.

    Processing order is that of `transformers`: repetition penalty, temperature, top-k, top-p, min-p.
    Temperature 0 is greedy. `top_k=0` and `top_p=1` and `min_p=0` switch a filter off.
    `logprobs=n` returns the log-probability of the chosen token and the `n` best ones.

    Raises:
        InvalidRequestError: a value is out of range; the message names the field.
    """

    max_new_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        def require(ok: bool, name: str, rule: str, value: object) -> None:
            if not ok:
                raise InvalidRequestError(f"sampling.{name}", f"must be {rule}, got {value!r}")

        n = self.max_new_tokens
        require(n is None or n >= 1, "max_new_tokens", "at least 1", n)
        t = self.temperature
        require(math.isfinite(t) and 0 <= t <= 100, "temperature", "between 0 (greedy) and 100", t)
        require(0 < self.top_p <= 1, "top_p", "over 0 and at most 1", self.top_p)
        require(self.top_k >= 0, "top_k", "0 (off) or more", self.top_k)
        require(0 <= self.min_p <= 1, "min_p", "between 0 (off) and 1", self.min_p)
        p = self.repetition_penalty
        require(
            math.isfinite(p) and 0 < p <= 100, "repetition_penalty", "over 0 (1 is off) and at most 100", p
        )
        s = self.seed
        require(s is None or 0 <= s < 2**63, "seed", "between 0 and 2**63-1", s)
        require(
            len(self.stop) <= MAX_STOP_STRINGS, "stop", f"at most {MAX_STOP_STRINGS} strings", len(self.stop)
        )
        require(all(self.stop), "stop", "without empty strings", self.stop)
        k = self.logprobs
        require(k is None or 0 <= k <= MAX_TOP_LOGPROBS, "logprobs", f"between 0 and {MAX_TOP_LOGPROBS}", k)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One position: the token at it, its log-probability (natural log, of the unmodified distribution)."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(slots=True)
class Timings:
    """Seconds a request has spent in each stage. Stages that recur (after a preemption) add up."""

    queue: float = 0.0  # waiting for a place in the batch
    load: float = 0.0  # waiting for its adapter
    prefill: float = 0.0
    decode: float = 0.0


@dataclass(frozen=True, slots=True)
class Trace:
    """The call that a traced request belongs to: the trace's id in hex, and its span's context for children.

    It began at `started_ns` of the epoch, which was `started` on the clock of `time.perf_counter`.
    """

    id: str
    parent: Any
    started_ns: int
    started: float


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """Generate from `prompt_ids`. `adapter` None means the base model.

    `resolve_seconds` were spent to find its version in the store; they count as loading.

    Fairness counts the adapter's tenant, and `tenant` where there is no adapter. Nobody waits for the answer
    after `deadline`, on the clock of `time.perf_counter`.
    """

    id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    adapter: AdapterRef | None = None
    resolve_seconds: float = 0.0
    tenant: str = ""
    deadline: float | None = None
    trace: Trace | None = None


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """Log-probabilities of `prompt_ids[score_from:]`, each given all tokens before it. `score_from` >= 1."""

    id: str
    prompt_ids: tuple[int, ...]
    score_from: int = 1
    top_logprobs: int = 0
    adapter: AdapterRef | None = None
    resolve_seconds: float = 0.0
    tenant: str = ""
    deadline: float | None = None
    trace: Trace | None = None


@dataclass(frozen=True, slots=True)
class Delta:
    """New output of a running request. `text` is what became printable, so it can be empty."""

    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Finished:
    """The last event of a generation. `tokens` counts the new tokens, a final end-of-sequence included."""

    finish_reason: FinishReason
    num_prompt_tokens: int
    num_generated_tokens: int
    path: ServingPath
    timings: Timings


@dataclass(frozen=True, slots=True)
class Scored:
    """The only event of a score request; one entry per token of `prompt_ids[score_from:]`."""

    logprobs: tuple[TokenLogprob, ...]
    num_prompt_tokens: int
    path: ServingPath
    timings: Timings = field(default_factory=Timings)


@dataclass(frozen=True, slots=True)
class Failed:
    """The request ended without a result; `error` is one of `errors.py`."""

    error: Exception


Event = Delta | Finished | Scored | Failed
