"""What a step gave: tokens to their sequences, events to whoever waits for them."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from hotswap_server.core import AdapterRef, Delta, Event, Failed, Finished, FinishReason, Scored, ScoreRequest
from hotswap_server.engine.observer import EngineObserver, RequestRecord
from hotswap_server.engine.sampler import Sampled, SamplingRow, describe_logprob, sample
from hotswap_server.engine.scheduler import Scheduled
from hotswap_server.engine.sequence import EventSink, Sequence
from hotswap_server.errors import EngineError, RequestCancelledError


class Collector:
    """Samples, appends, and decides what ends. `end` must take a sequence out of the engine."""

    def __init__(
        self, eos_token_ids: frozenset[int], end: Callable[[Sequence], None], observer: EngineObserver
    ) -> None:
        self.on_poison: Callable[[AdapterRef], None] = lambda ref: None
        """Called after a step for an adapter of which a row was not finite, if the base's were."""
        self._poisoned: list[AdapterRef | None] = []  # in this step
        self._num_finite = 0  # requests in this step
        self._base_failed = False  # and nothing has been finite since
        self._eos_token_ids = eos_token_ids
        self._end = end
        self._observer = observer
        self._events: list[tuple[EventSink, Event]] = []

    def take(self) -> list[tuple[EventSink, Event]]:
        """The events since the last call, in order."""
        events, self._events = self._events, []
        return events

    def collect(self, batch: list[Scheduled], rows_per_entry: list[int], logits: torch.Tensor) -> None:
        """Use the `logits` [rows, vocabulary] of a step, of which each entry has its count in order."""
        self._num_finite, self._poisoned = 0, []
        indices: list[int] = []
        generating: list[Sequence] = []
        offset = 0
        for entry, count in zip(batch, rows_per_entry, strict=True):
            sequence = entry.sequence
            if sequence.ended:
                pass
            elif isinstance(sequence.request, ScoreRequest):
                first = sequence.num_computed - entry.num_new
                self._score(sequence, sequence.request, first, logits[offset : offset + count])
            elif count:
                indices.append(offset)
                generating.append(sequence)
            offset += count
        rows = [SamplingRow(s.sampling, s.seed, s.num_generated, s.token_ids) for s in generating]
        chosen = sample(logits if len(indices) == offset else logits[indices], rows)
        self._take_tokens(generating, chosen)

    def collect_chosen(
        self, batch: list[Scheduled], rows: list[int | None], tokens: list[int | None]
    ) -> None:
        """As `collect`, for a step that has chosen the `tokens` itself; each entry has its row, or none."""
        self._num_finite, self._poisoned = 0, []
        generating = [
            (entry.sequence, tokens[row])
            for entry, row in zip(batch, rows, strict=True)
            if row is not None and not entry.sequence.ended
        ]
        sampled = [None if token is None else Sampled(token, None) for _, token in generating]
        self._take_tokens([sequence for sequence, _ in generating], sampled)

    def _take_tokens(self, generating: list[Sequence], chosen: list[Sampled | None]) -> None:
        for sequence, sampled in zip(generating, chosen, strict=True):
            if sequence.ended:  # an observer of those before saw to that
                continue
            if sampled is None:
                self._fail_without_logits(sequence)
            else:
                self._num_finite += 1
                self._append(sequence, sampled)
        if self._poisoned or self._base_failed:
            self._blame()

    def fail(self, sequence: Sequence, error: Exception) -> None:
        """End a sequence with an error."""
        self._end(sequence)
        self._events.append((sequence.sink, Failed(error)))
        self._record(sequence, None, error)

    def cancel(self, sequence: Sequence) -> None:
        """End a sequence that nobody waits for any more."""
        self._end(sequence)
        self._record(sequence, None, RequestCancelledError("the caller left"))

    def _fail_without_logits(self, sequence: Sequence) -> None:
        who = sequence.request.adapter or "the base"
        self._poisoned.append(sequence.request.adapter)
        self.fail(sequence, EngineError(f"{who} gave no finite logits for this input"))

    def _blame(self) -> None:
        poisoned, self._poisoned = self._poisoned, []
        if self._num_finite:
            self._base_failed = False
        self._base_failed |= None in poisoned
        refs = {ref for ref in poisoned if ref is not None}
        # Where the base fails too, or all do at once, no adapter is to blame.
        if self._base_failed or (len(refs) > 1 and not self._num_finite):
            return
        for ref in refs:
            self.on_poison(ref)

    def _append(self, sequence: Sequence, sampled: Sampled) -> None:
        now = time.perf_counter()
        if sequence.last_token_at is None:
            sequence.first_token_at = now
        else:
            sequence.inter_token.append(now - sequence.last_token_at)
        sequence.last_token_at = now
        token, detokenizer = sampled.token_id, sequence.detokenizer
        sequence.append(token)
        if detokenizer is None:
            raise RuntimeError("a generation has a detokenizer")
        text, reason = "", None
        if self._is_stop_token(sequence, token):
            reason = FinishReason.STOP_TOKEN
        else:
            text, found = detokenizer.add(token)
            if found:
                reason = FinishReason.STOP_STRING
            elif sequence.num_generated >= sequence.max_new_tokens:
                reason = FinishReason.LENGTH
        if reason in (FinishReason.STOP_TOKEN, FinishReason.LENGTH):
            text += detokenizer.finish()
        logprobs = () if sampled.logprob is None else (sampled.logprob,)
        self._events.append((sequence.sink, Delta((token,), text, logprobs)))
        if reason is not None:
            self._finish(sequence, reason)

    def _is_stop_token(self, sequence: Sequence, token: int) -> bool:
        params = sequence.sampling
        return token in params.stop_token_ids or (not params.ignore_eos and token in self._eos_token_ids)

    def _score(self, sequence: Sequence, request: ScoreRequest, first: int, logits: torch.Tensor) -> None:
        if not logits.amax(dim=-1).isfinite().all():
            self._fail_without_logits(sequence)
            return
        self._num_finite += len(logits) > 0
        position = max(first, request.score_from - 1)
        for row in logits:
            target = request.prompt_ids[position + 1]
            sequence.scored.append(describe_logprob(row.log_softmax(dim=-1), target, request.top_logprobs))
            position += 1
        if sequence.num_uncomputed == 0:
            self._end(sequence)
            scored = Scored(
                tuple(sequence.scored), sequence.num_prompt_tokens, sequence.path, sequence.timings
            )
            self._events.append((sequence.sink, scored))
            self._record(sequence, None, None)

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        self._end(sequence)
        finished = Finished(
            finish_reason=reason,
            num_prompt_tokens=sequence.num_prompt_tokens,
            num_generated_tokens=sequence.num_generated,
            path=sequence.path,
            timings=sequence.timings,
        )
        self._events.append((sequence.sink, finished))
        self._record(sequence, reason, None)

    def _record(self, sequence: Sequence, reason: FinishReason | None, error: Exception | None) -> None:
        first = sequence.first_token_at
        self._observer.finished(
            RequestRecord(
                method=sequence.method,
                path=sequence.path,
                finish_reason=reason,
                error=error,
                num_prompt_tokens=sequence.num_prompt_tokens,
                num_generated_tokens=sequence.num_generated,
                timings=sequence.timings,
                ttft=None if first is None else first - sequence.arrived,
                inter_token=tuple(sequence.inter_token),
                adapter=sequence.request.adapter,
                trace=sequence.request.trace,
            )
        )
