"""Decode steps as CUDA graphs: recorded once for a batch size and the methods in it, then replayed.

A graph reads everything that changes from one step to the next, the adapters' slots included, from buffers
that stay where they are. So adapters come and go, and sampling parameters change, without a new recording.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import structlog
import torch

from hotswap_server.engine.attention import OTHERS, StepState
from hotswap_server.engine.buffers import GraphInputs, StepBuffers, empty_inputs
from hotswap_server.engine.compiling import compile_no_more
from hotswap_server.engine.merging import MergedWeights

_log = structlog.get_logger(__name__)

Key = tuple[int, tuple[tuple[str, int, int], ...], int]
"""Padded batch size; the methods that do something in it, with their paths and the most tiles of their slots;
and the merge that it runs on."""

Progress = Callable[[int, int], None]
"""Told how many of how many graphs are ready."""


def ignore_progress(done: int, total: int) -> None:
    """For whoever shows none."""


def graph_sizes(max_batch_size: int) -> list[int]:
    """Batch sizes to record for; a batch is padded to the next one."""
    sizes = [size for size in (1, 2, 4) if size < max_batch_size]
    sizes += range(8, min(max_batch_size, 64), 8)
    sizes += range(64, max_batch_size, 32)
    return sorted({*sizes, max_batch_size})


class DecodeGraphs:
    """Records on demand; `forward` computes logits [size, vocabulary]."""

    def __init__(
        self,
        state: StepState,
        merges: MergedWeights,
        forward: Callable[[GraphInputs], torch.Tensor],
        device: torch.device,
    ) -> None:
        self._state = state
        self._merges = merges
        self._forward = forward
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool: Any = None
        self._recorded: dict[Key, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}

    def __len__(self) -> int:
        return len(self._recorded)

    def run(self, inputs: GraphInputs) -> torch.Tensor:
        """Logits [used, vocabulary], valid until the next call."""
        key = self._key(inputs)
        found = self._recorded.get(key)
        if found is None:
            found = self._recorded[key] = self._record(inputs, key)
        graph, logits = found
        graph.replay()
        return logits[: inputs.used]

    def _key(self, inputs: GraphInputs) -> Key:
        paths = []
        for method, slots in inputs.slots.items():
            # A method that marked nothing, such as prefixes, leaves the forward as it is.
            path = 0 if method == OTHERS else self._state.path(method, slots.used)
            if path is not None:
                tiles = 0 if slots.tiles is None else slots.tiles.shape[0]
                paths.append((method, path, tiles))
        return inputs.size, tuple(sorted(paths)), self._merges.serial if inputs.merged else 0

    def _record(self, inputs: GraphInputs, key: Key) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        started = time.perf_counter()
        # Weights that were merged once will never run again.
        for old in [k for k in self._recorded if k[2] and k[2] != self._merges.serial]:
            del self._recorded[old]
        if not self._recorded:
            self._pool = torch.cuda.graph_pool_handle()  # one is lost with the last graph that had it
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):
            # Compiles what is new; a step may run twice, since it writes the same to the same places, but for
            # the tokens that it chooses, where it looks for those of the step before.
            before = inputs.flat.clone()
            self._forward(inputs)
            inputs.flat.copy_(before)
            self._stream.synchronize()
            # Other threads may go on, such as the one that copies adapters.
            graph.capture_begin(self._pool, capture_error_mode="thread_local")
            try:
                logits = self._forward(inputs)
            finally:
                graph.capture_end()
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
        seconds = time.perf_counter() - started
        _log.info(
            "graph_recorded",
            batch_size=key[0],
            methods=[name for name, *_ in key[1]],
            seconds=round(seconds, 3),
        )
        return graph, logits


def record_sizes(
    graphs: DecodeGraphs,
    buffers: StepBuffers,
    sizes: Sequence[int],
    progress: Progress,
    *,
    limit: float,
    clock: Callable[[], float] = time.monotonic,
) -> list[int]:
    """Record the base's graphs, the largest first, whose memory then serves the others.

    After `limit` seconds no more are begun, nor is more code compiled: the sizes recorded by then, at least
    the largest, are returned and do for smaller batches too.
    """
    began, recorded = clock(), list[int]()
    for size in sorted(sizes, reverse=True):
        if recorded and clock() - began > limit:
            _log.warning(
                "graphs_not_recorded",
                limit_s=limit,
                recorded=len(recorded),
                wanted=len(sizes),
                effect="smaller batches run as larger ones, and what is not compiled yet runs uncompiled",
                remedy="start again, since what was compiled is kept, or raise --graph-timeout",
            )
            compile_no_more()
            break
        progress(len(recorded), len(sizes))
        graphs.run(empty_inputs(buffers, size))
        recorded.append(size)
    else:
        progress(len(sizes), len(sizes))
    return sorted(recorded)
