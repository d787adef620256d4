"""A request on its way through the engine."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, auto

from hotswap_server.core import (
    BASE_METHOD,
    Event,
    GenerateRequest,
    SamplingParams,
    ScoreRequest,
    ServingPath,
    Timings,
    TokenLogprob,
)
from hotswap_server.engine.detokenizer import Detokenizer
from hotswap_server.engine.prefixes import Prefix

EventSink = Callable[[Event], None]

_SCORE_SAMPLING = SamplingParams(max_new_tokens=1, temperature=0.0)


class Stage(Enum):
    """What a sequence is doing; the time in each is reported."""

    QUEUED = auto()
    PREFILL = auto()
    DECODE = auto()


@dataclass(slots=True, eq=False)
class Sequence:
    """Tokens, pages and progress of one request. Only the engine thread touches it after submission."""

    request: GenerateRequest | ScoreRequest
    sink: EventSink
    max_new_tokens: int
    detokenizer: Detokenizer | None = None
    token_ids: list[int] = field(default_factory=list)
    num_computed: int = 0  # tokens whose keys and values are in pages, or will be when the steps underway end
    num_pending: int = 0  # tokens that steps underway will give
    chosen_at: int = 0  # the row of the latest of these among what its step chooses
    plain: bool = field(init=False)  # its tokens are the likeliest ones, of which nothing more is asked
    ended: bool = False  # it is out of the engine
    pages: list[int] = field(default_factory=list)  # those of the prefix come first
    expected: bool = False  # its adapter has been told to come
    slot: int | None = None  # the adapter's, held until the request ends
    merged: bool = False  # whether the last step ran over weights that hold its adapter
    tenant: str = ""  # who is charged: the adapter's tenant, else the request's
    order: int = 0  # of arrival, given by the queue
    charged: bool = False  # whether its prompt was
    service_before: float = 0.0  # what its tenant had had when it began to run
    lane_time: float = 0.0  # that the lane had been without its adapter when this one joined it
    prefix: Prefix | None = None  # the adapter's, known when it has a slot
    seed: int = 0
    scored: list[TokenLogprob] = field(default_factory=list)
    timings: Timings = field(default_factory=Timings)
    arrived: float = field(default_factory=time.perf_counter)
    first_token_at: float | None = None
    last_token_at: float | None = None
    inter_token: list[float] = field(default_factory=list)
    _stage: Stage = Stage.QUEUED
    _stage_since: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        self.token_ids = list(self.request.prompt_ids)
        self.timings.load = self.request.resolve_seconds
        adapter = self.request.adapter
        self.tenant = self.request.tenant if adapter is None else adapter.tenant
        sampling = self.sampling
        self.plain = (
            not self.is_score
            and sampling.greedy
            and sampling.logprobs is None
            and sampling.repetition_penalty == 1
        )
        given = sampling.seed
        self.seed = secrets.randbits(63) if given is None else given

    @property
    def id(self) -> str:
        return self.request.id

    @property
    def sampling(self) -> SamplingParams:
        return self.request.sampling if isinstance(self.request, GenerateRequest) else _SCORE_SAMPLING

    @property
    def is_score(self) -> bool:
        return isinstance(self.request, ScoreRequest)

    @property
    def method(self) -> str:
        return BASE_METHOD if self.request.adapter is None else self.request.adapter.method

    @property
    def path(self) -> ServingPath:
        """That of the last step."""
        if self.request.adapter is None:
            return ServingPath.BASE
        return ServingPath.MERGED if self.merged else ServingPath.BATCHED

    @property
    def num_prefix_tokens(self) -> int:
        """Positions before the first token of the prompt."""
        return 0 if self.prefix is None else self.prefix.num_tokens

    @property
    def num_tokens(self) -> int:
        """Those that are still to come from steps underway included."""
        return len(self.token_ids) + self.num_pending

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt_ids)

    @property
    def num_generated(self) -> int:
        """Tokens that are known."""
        return len(self.token_ids) - len(self.request.prompt_ids)

    @property
    def num_uncomputed(self) -> int:
        return self.num_tokens - self.num_computed

    @property
    def has_last_pending(self) -> bool:
        """Whether it ends, by its length at the latest, with what steps underway will give."""
        return self.num_pending > 0 and self.num_generated + self.num_pending >= self.max_new_tokens

    def launched(self, num_new: int, row: int | None) -> None:
        """A step with `num_new` more of its tokens runs, which gives another one in `row` of its choice."""
        self.num_computed += num_new
        if row is not None:
            self.num_pending += 1
            self.chosen_at = row

    def append(self, token: int) -> None:
        """The oldest of the tokens that were pending is there."""
        self.num_pending -= 1
        self.token_ids.append(token)
        if self._stage is not Stage.QUEUED:  # else it was preempted meanwhile
            self.enter(Stage.DECODE)

    def admit(self, without_adapter: float) -> None:
        """It runs now; `without_adapter` seconds of its waiting were for its adapter."""
        self.enter(Stage.PREFILL)
        self.timings.queue -= without_adapter
        self.timings.load += without_adapter

    def enter(self, stage: Stage) -> None:
        """Close the account of the present stage and open the next one's."""
        now = time.perf_counter()
        spent = now - self._stage_since
        match self._stage:
            case Stage.QUEUED:
                self.timings.queue += spent
            case Stage.PREFILL:
                self.timings.prefill += spent
            case Stage.DECODE:
                self.timings.decode += spent
        self._stage, self._stage_since = stage, now
