"""What a step costs on a GPU: replays of decode graphs beside the floor that memory bandwidth sets."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from hotswap_server.adapters.method import BankOptions
from hotswap_server.adapters.methods.bottleneck import BottleneckBank
from hotswap_server.adapters.methods.ia3 import Ia3Bank
from hotswap_server.adapters.methods.lora.bank import LoraBank
from hotswap_server.bench.shapes import random_bottleneck, random_ia3, random_lora, random_prefix
from hotswap_server.core import AdapterRef, GenerateRequest, SamplingParams
from hotswap_server.engine.base import BaseModel
from hotswap_server.engine.batch import BatchBuilder, StepInputs
from hotswap_server.engine.buffers import StepBuffers
from hotswap_server.engine.graphs import graph_sizes
from hotswap_server.engine.kv_cache import PagedKVCache
from hotswap_server.engine.runner import ModelRunner
from hotswap_server.engine.scheduler import Scheduled
from hotswap_server.engine.sequence import Sequence as Request

_PAGE = 16
_REPLAYS, _ROUNDS = 20, 5


@dataclass(frozen=True, slots=True)
class StepTime:
    """Milliseconds of a step on the GPU, median of rounds, and their spread. `adapters` are distinct ones."""

    case: str
    adapters: int
    batch: int
    ms: float
    spread: float
    floor_ms: float


@dataclass(slots=True)
class StepBench:
    """A base with a cache that holds `max_batch` sequences of `context` tokens."""

    base: BaseModel
    context: int
    max_batch: int
    max_prefix: int = 32
    bandwidth: float = 0.0
    """Bytes per second, read plus written, of a large copy."""
    times: list[StepTime] = field(default_factory=list)
    _cache: PagedKVCache = field(init=False)
    _runner: ModelRunner = field(init=False)
    _builder: BatchBuilder = field(init=False)

    def __post_init__(self) -> None:
        device = self.base.device
        max_pages = -(-(self.context + self.max_prefix + 1) // _PAGE)
        self._cache = PagedKVCache(
            self.base.attention,
            num_pages=self.max_batch * max_pages,
            page_size=_PAGE,
            dtype=self.base.dtype,
            device=device,
        )
        for tensor in (*self._cache.keys, *self._cache.values):
            tensor.normal_()
        graphs = self.base.state.kernels.can_be_recorded
        buffers = None
        if graphs:
            buffers = StepBuffers(max_sequences=self.max_batch, max_pages=max_pages, device=device)
        self._builder = BatchBuilder(
            max_tokens=max(self.max_batch, 16 * self.context),
            max_sequences=self.max_batch,
            max_pages=max_pages,
            page_size=_PAGE,
            device=device,
            buffers=buffers,
            sizes=graph_sizes(self.max_batch),
        )
        self._runner = ModelRunner(self.base, self._cache, max_sequences=self.max_batch, buffers=buffers)
        self.bandwidth = copy_bandwidth(device)

    def decode(
        self, case: str, batch: int, adapters: Sequence[tuple[str, int] | None] = (None,), extra: int = 0
    ) -> StepTime:
        """A step of `batch` tokens; request i uses the method and slot of `adapters[i mod len]`.

        `extra` bytes are the adapters' own that the floor counts.
        """
        requests = self._requests(batch, adapters)
        inputs = self._builder.build([Scheduled(request, 1) for request in requests])
        rounds = self._time(lambda: self._replay(inputs))
        for request in requests:
            self._cache.pages.release(request.pages)
        kv = sum(2 * site.kv_heads * site.head_dim for site in self.base.attention)
        tokens = sum(self.context + request.num_prefix_tokens for request in requests)
        total = self.weight_bytes + tokens * kv * self.base.dtype.itemsize + extra
        found = StepTime(
            case,
            _distinct(batch, adapters),
            batch,
            statistics.median(rounds),
            max(rounds) - min(rounds),
            total / self.bandwidth * 1e3,
        )
        self.times.append(found)
        return found

    def prefill(
        self, case: str, batch: int, adapters: Sequence[tuple[str, int] | None] = (None,)
    ) -> StepTime:
        """A step of `batch` prompts of `context` tokens."""
        requests = self._requests(batch, adapters)
        for request in requests:
            request.num_computed = 0
        entries = [Scheduled(request, self.context) for request in requests]
        inputs = self._builder.build(entries)
        rounds = self._time(lambda: self._runner.run(inputs), replays=2, rounds=3)
        for request in requests:
            self._cache.pages.release(request.pages)
        distinct = _distinct(batch, adapters)
        found = StepTime(
            case, distinct, batch, statistics.median(rounds), max(rounds) - min(rounds), float("nan")
        )
        self.times.append(found)
        return found

    @property
    def weight_bytes(self) -> int:
        """What a step reads: everything but the table of embeddings, of which it takes a few rows."""
        base = self.base
        table = 0 if base.tied_head or base.embedding is None else base.embedding.weight.nbytes
        return base.weight_bytes - table

    def inputs(self, batch: int, adapters: Sequence[tuple[str, int] | None] = (None,)) -> StepInputs:
        """A decode step's, for whoever wants to run it; its pages stay taken."""
        return self._builder.build([Scheduled(request, 1) for request in self._requests(batch, adapters)])

    def run(self, inputs: StepInputs) -> torch.Tensor:
        return self._runner.run(inputs)

    def _replay(self, inputs: StepInputs) -> None:
        if self._runner.graphs is not None and inputs.graph is not None:
            self._runner.graphs.run(inputs.graph)
        else:
            self._runner.run(inputs)

    def _time(
        self, run: Callable[[], object], *, replays: int = _REPLAYS, rounds: int = _ROUNDS
    ) -> list[float]:
        with torch.inference_mode():
            for _ in range(2):
                run()
            return [time_on(self.base.device, run, replays) for _ in range(rounds)]

    def _requests(self, batch: int, adapters: Sequence[tuple[str, int] | None]) -> list[Request]:
        requests = []
        for index in range(batch):
            used = adapters[index % len(adapters)]
            ref = None if used is None else AdapterRef("bench/adapter", 1, f"{used[0]}-{used[1]}", used[0])
            ids = tuple(torch.randint(10, self.base.vocab_size, (self.context,)).tolist())
            request = Request(GenerateRequest(str(index), ids, SamplingParams(), ref), _ignore, 1)
            request.num_computed = self.context - 1
            if used is not None:
                request.slot = used[1]
                request.prefix = self.base.prefixes.get(used)
            total = self.context + request.num_prefix_tokens
            pages = self._cache.pages.allocate(self._cache.pages_for(total))
            if pages is None:
                raise RuntimeError(f"the cache holds {self.max_batch} sequences")
            request.pages = pages
            requests.append(request)
        return sorted(requests, key=lambda request: (request.method, request.slot or 0))


def _distinct(batch: int, adapters: Sequence[tuple[str, int] | None]) -> int:
    return len({adapter for adapter in adapters[:batch] if adapter is not None})


def fill_loras(base: BaseModel, slots: int, rank: int, targets: Sequence[str]) -> int:
    """Attach a bank of random LoRAs; returns the bytes of one."""
    bank, nbytes = LoraBank(base, BankOptions(num_slots=slots, max_lora_rank=rank)), 0
    for slot in range(slots):
        adapter = random_lora(base, rank, targets)
        bank.put(slot, adapter)
        nbytes = adapter.nbytes
    return nbytes


def fill_bottlenecks(base: BaseModel, slots: int, size: int) -> int:
    """Attach a bank of random bottleneck adapters; returns the bytes of one."""
    bank, nbytes = BottleneckBank(base, BankOptions(num_slots=slots, max_bottleneck_size=size)), 0
    for slot in range(slots):
        adapter = random_bottleneck(base, size)
        bank.put(slot, adapter)
        nbytes = adapter.nbytes
    return nbytes


def fill_ia3(base: BaseModel, slots: int) -> int:
    """Attach a bank of random IA³ adapters on keys, values and the MLP's output; returns the bytes of one."""
    bank, nbytes = Ia3Bank(base, BankOptions(num_slots=slots)), 0
    for slot in range(slots):
        adapter = random_ia3(base)
        bank.put(slot, adapter)
        nbytes = adapter.nbytes
    return nbytes


def measure_grid(bench: StepBench, case: str, method: str, nbytes: int) -> None:
    """Steps of 1, 8, 32 and 64 requests with one adapter of `method` for all, and with one each, up to 32."""
    for batch in (1, 8, 32, 64):
        for adapters in sorted({1, min(batch, 32)}):
            own = [(method, slot) for slot in range(adapters)]
            bench.decode(case, batch, own, nbytes * adapters)


def place_prefixes(base: BaseModel, slots: int, tokens: int) -> None:
    for slot in range(slots):
        base.prefixes["prefix", slot] = random_prefix(base, tokens, f"prefix-{slot}")


def time_on(device: torch.device, run: Callable[[], object], count: int) -> float:
    """Milliseconds of one of `count` runs, by the device's clock."""
    if device.type != "cuda":
        started = time.perf_counter()
        for _ in range(count):
            run()
        return (time.perf_counter() - started) / count * 1e3
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    for _ in range(count):
        run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / count


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read plus written, of a copy larger than any cache."""
    size = 2**31 if device.type == "cuda" else 2**27
    source = torch.empty(size, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    for _ in range(2):
        target.copy_(source)
    ms = min(time_on(device, lambda: target.copy_(source), 5) for _ in range(3))
    return 2 * size / (ms * 1e-3)


def _ignore(event: object) -> None:
    """Nobody waits for what a measured request gives."""
