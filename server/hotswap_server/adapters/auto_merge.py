"""Merges and unmerges as a policy says, from what the engine tells after each step."""

from __future__ import annotations

from concurrent.futures import Future

import structlog

from hotswap_server.adapters.merges import MergeChange, Merges
from hotswap_server.adapters.method import MergeableMethod, available_methods
from hotswap_server.core import AdapterRef
from hotswap_server.engine.merge_policy import MergePolicy
from hotswap_server.engine.observer import RequestRecord, StepRecord
from hotswap_server.errors import MergeRefusedError

_log = structlog.get_logger(__name__)


class AutoMerge:
    """An EngineObserver. What an operator has merged it leaves merged, what one has unmerged, unmerged."""

    def __init__(self, policy: MergePolicy, merges: Merges) -> None:
        self._policy = policy
        self._merges = merges
        self._own: AdapterRef | None = None  # merged by this policy
        self._trying: tuple[AdapterRef | None, Future[MergeChange]] | None = None

    def finished(self, record: RequestRecord) -> None: ...

    def step(self, record: StepRecord) -> None:
        begun = self._policy.observe(record.adapter_tokens)
        if self._trying is not None:
            self._settle(*self._trying)
        elif begun:
            self._decide()

    def _decide(self) -> None:
        merged = self._merges.merged
        if self._own is not None and merged != self._own:
            self._policy.let_be(self._own)
            self._policy.changed()
            self._own = None
        if merged != self._own:
            return  # by an operator
        wanted = self._policy.wanted(merged)
        if wanted == merged:
            return
        if wanted is None:
            if merged is not None:
                self._trying = None, self._merges.unmerge(merged.name, merged.version)
        elif not isinstance(available_methods()[wanted.method], MergeableMethod):
            self._policy.refuse(wanted)
        else:
            self._trying = wanted, self._merges.merge(wanted)

    def _settle(self, wanted: AdapterRef | None, change: Future[MergeChange]) -> None:
        if not change.done():
            return
        self._trying = None
        self._policy.changed()
        error = change.exception()
        if error is None:
            self._own = wanted
            return
        _log.warning("merge_policy_failed", adapter=str(wanted or self._own), error=str(error))
        if wanted is not None and isinstance(error, MergeRefusedError):
            self._policy.refuse(wanted)
