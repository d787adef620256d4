"""What an engine is started with, and what it tells of itself."""

from __future__ import annotations

from dataclasses import dataclass, field

from hotswap_server.engine.fairness import FairnessOptions
from hotswap_server.engine.overload import QueueOptions


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Limits fixed at start. Sizes are in tokens, sequences or bytes as their names say."""

    max_batch_size: int = 64
    max_batch_tokens: int = 512
    page_size: int = 16
    kv_cache_bytes: int = 2**30
    max_context: int | None = None
    queue: QueueOptions = field(default_factory=QueueOptions)
    step_timeout: float = 120.0
    fairness: FairnessOptions = field(default_factory=FairnessOptions)
    graphs: bool = True  # on a GPU, replay steps instead of calling the model
    graph_timeout: float = 300.0  # seconds after which no more of them are begun at the start
    run_ahead: bool | None = None  # launch a step before the tokens of the last are read; None: on a GPU


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A moment's counts."""

    running: int
    waiting: int
    kv_pages_used: int
    kv_pages_total: int
    kv_pages_prefixes: int  # of those used, the ones that prefixes hold, whoever runs
    preemptions: int
    sound: bool  # see `EngineHealth`
    steps_failed: int
    steps_stuck: int
    adapters_quarantined: int  # since the start
