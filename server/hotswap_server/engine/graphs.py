"""Steps as CUDA graphs: recorded once for a number of tokens and the methods in it, then replayed.

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
from hotswap_server.kernels import TokenSlots

_PROMPT_SIZES = (64, 128, 192, 256, 384, 512, 768, 1024)  # beyond, the host is quicker than the device
_MAX_GRAPHS, _MAX_MET = 256, 4096

_log = structlog.get_logger(__name__)

Tiling = tuple[int, int]
"""The most tiles that slots may have, and the most tokens of a tile."""

Key = tuple[int, bool, tuple[tuple[str, int, Tiling, Tiling], ...], int]
"""Padded number of tokens; whether there are prompts among them; the methods that do something, with their
paths and the tiles of their slots, those of the tokens and those with logits; the merge that it runs on."""

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


def prompt_sizes(max_batch_tokens: int) -> list[int]:
    """Numbers of tokens to record steps with prompts for, padded likewise; larger ones are not recorded."""
    most = min(max_batch_tokens, _PROMPT_SIZES[-1])
    return [*(size for size in _PROMPT_SIZES if size < most), most]


class StepGraphs:
    """Records on demand; `forward` computes logits [rows, vocabulary], as many as a size has.

    A kind of step with prompts, of which there are many, is recorded when it comes a second time.
    """

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
        self._met: set[Key] = set()

    def __len__(self) -> int:
        return len(self._recorded)

    def run(self, inputs: GraphInputs) -> torch.Tensor:
        """Logits [used, vocabulary], valid until the next call."""
        key = self._key(inputs)
        if key not in self._recorded:
            if inputs.logit_rows is not None and key not in self._met:
                if len(self._met) >= _MAX_MET:
                    self._met.clear()
                self._met.add(key)
                return self._forward(inputs)[: inputs.used]
            self.record(inputs)
        graph, logits = self._recorded[key] = self._recorded.pop(key)  # the last to be forgotten
        graph.replay()
        return logits[: inputs.used]

    def record(self, inputs: GraphInputs) -> None:
        """Record steps such as `inputs`, without running one."""
        key = self._key(inputs)
        # Weights that were merged once will never run again.
        old = [k for k in self._recorded if k[-1] and k[-1] != self._merges.serial]
        for forgotten in old or [*self._recorded][: 1 + len(self._recorded) - _MAX_GRAPHS]:
            del self._recorded[forgotten]
        if not self._recorded:
            self._pool = torch.cuda.graph_pool_handle()  # one is lost with the last graph that had it
        self._recorded[key] = self._capture(inputs, key)

    def _key(self, inputs: GraphInputs) -> Key:
        paths = []
        for method, slots in inputs.slots.items():
            # A method that marked nothing, such as prefixes, leaves the forward as it is.
            path = 0 if method == OTHERS else self._state.path(method, slots.used)
            if path is not None:
                paths.append((method, path, _tiling(slots), _tiling(slots.logits)))
        prompts = inputs.logit_rows is not None
        return inputs.size, prompts, tuple(sorted(paths)), self._merges.serial if inputs.merged else 0

    def _capture(self, inputs: GraphInputs, key: Key) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        started = time.perf_counter()
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
            tokens=key[0],
            prompts=key[1],
            methods=[name for name, *_ in key[2]],
            seconds=round(seconds, 3),
        )
        return graph, logits


def _tiling(slots: TokenSlots | None) -> Tiling:
    return (0, 0) if slots is None or slots.tiles is None else (slots.tiles.shape[0], slots.tile_rows)


def record_sizes(
    graphs: StepGraphs,
    buffers: StepBuffers,
    sizes: Sequence[int],
    prompt_sizes: Sequence[int],
    progress: Progress,
    *,
    limit: float,
    clock: Callable[[], float] = time.monotonic,
) -> list[int]:
    """Record the base's graphs, the largest first, whose memory then serves the others.

    After `limit` seconds no more are begun, nor is more code compiled: of `sizes` those recorded by then, at
    least the largest, are returned and do for smaller batches too. Steps with prompts come last, and may
    still be recorded when there is one.
    """
    began, recorded = clock(), list[int]()
    wanted = [(size, False) for size in sorted(sizes, reverse=True)]
    wanted += [(size, True) for size in sorted(prompt_sizes, reverse=True)]
    for done, (size, prompts) in enumerate(wanted):
        if done and clock() - began > limit:
            _log.warning(
                "graphs_not_recorded",
                limit_s=limit,
                recorded=done,
                wanted=len(wanted),
                effect="smaller batches run as larger ones, and what is not compiled yet runs uncompiled",
                remedy="start again, since what was compiled is kept, or raise --graph-timeout",
            )
            compile_no_more()
            break
        progress(done, len(wanted))
        graphs.record(empty_inputs(buffers, size, prompts=prompts))
        if not prompts:
            recorded.append(size)
    else:
        progress(len(wanted), len(wanted))
    return sorted(recorded)
