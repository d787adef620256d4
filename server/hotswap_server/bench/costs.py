"""`hotswap bench --costs`: what a server's steps, loads and swaps cost, as its clients see them.

A `hotswap serve` is started and asked over loopback, so what is measured has everything in it that a request
meets: gRPC, scheduling, the model, sampling and sending.
"""

from __future__ import annotations

import os
import platform
import random
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import grpc
from hotswap.v1 import adapters_pb2, adapters_pb2_grpc

from hotswap_server.bench.fitting import Fit, Observation, Work, fit
from hotswap_server.bench.served import Answer, Ask, Served, send, served
from hotswap_server.errors import InvalidRequestError
from hotswap_server.fleet.costs import Costs

_NEW_TOKENS: Final = 33
_CONTEXTS: Final = (16, 256)
_PROMPTS: Final = (1, 8, 16, 32, 64, 128, 256, 512, 1024)

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured: batches up to `max_batch`, LoRAs of `rank` on all linear layers, `rounds` times."""

    max_batch: int = 16
    rank: int = 16
    rounds: int = 3
    max_batch_tokens: int = 512
    seed: int = 0


def measure_costs(
    base: Path, plan: Plan, *, quantize: str | None = None, options: Sequence[str] = (), tell: Tell = print
) -> Costs:
    """The costs of a server of `base`, started with `options`, flags of `hotswap serve`.

    Raises:
        InvalidRequestError: its key-value cache is too small for the largest batch.
        ServerProcessError: it did not start.
    """
    flags = ["--adapter-slots", str(plan.max_batch), "--max-batch-size", str(max(plan.max_batch, 2))]
    flags += ["--max-batch-tokens", str(plan.max_batch_tokens), "--max-lora-rank", str(plan.rank)]
    flags += ["--quantize", quantize] if quantize else []
    with tempfile.TemporaryDirectory(prefix="hotswap-bench-") as folder:
        store = Path(folder)
        tell("writing adapters")
        names, vocab_size = write_store(base, store, plan.max_batch, plan.rank)
        tell("starting a server")
        with served(base, store, *flags, *options) as server:
            bench = _Bench(server, names, vocab_size, plan)
            tell("warming up")
            bench.warm_up()
            for number in range(plan.rounds):
                tell(f"measuring, round {number + 1} of {plan.rounds}")
                bench.round()
            metrics = server.metrics()
    found = bench.fit()
    about = {
        "base": base.name,
        "rank": plan.rank,
        "max_batch": plan.max_batch,
        "rounds": plan.rounds,
        "options": [*flags, *options],
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "hotswap": metadata.version("hotswap"),
        "torch": metadata.version("torch"),
        "largest_error_of_fit": max(map(abs, found.errors)),
        "median_error_of_fit": statistics.median(map(abs, found.errors)),
    }
    return Costs(
        step=found.step,
        call_seconds=found.call_seconds,
        load_seconds=bench.load_seconds,
        swap_seconds=bench.swap_seconds,
        adapter_bytes=round(
            metrics["hotswap_host_cache_bytes"] / max(metrics["hotswap_host_cache_adapters"], 1)
        ),
        about=about,
    )


def write_store(base: Path, store: Path, count: int, rank: int) -> tuple[list[str], int]:
    """Random LoRAs on all linear layers of `base`: their names, and the base's vocabulary."""
    import torch

    from hotswap_server.adapters import synthetic
    from hotswap_server.bench.mix import save_adapter
    from hotswap_server.bench.workload import ALL_LINEAR
    from hotswap_server.engine.base import load_base
    from hotswap_server.kernels import select_kernels

    cpu = torch.device("cpu")
    kernels = select_kernels(cpu, torch.float32, "reference")
    loaded = load_base(base, kernels=kernels, device=cpu, dtype=torch.float32)
    names = [f"bench/adapter-{index:05}" for index in range(count)]
    for name in names:
        save_adapter(store / name, *synthetic.lora(loaded, rank, ALL_LINEAR))
    return names, loaded.vocab_size


class _Bench:
    """Measurements of one server, which pile up by what was measured."""

    def __init__(self, server: Served, names: list[str], vocab_size: int, plan: Plan) -> None:
        self._server = server
        self._names = names
        self._plan = plan
        self._vocab_size = vocab_size
        self._random = random.Random(plan.seed)
        self._seconds: dict[tuple[tuple[Work, ...], int], list[float]] = {}
        self._first: dict[str, list[float]] = {"slot": [], "host": [], "store": []}
        room = min(server.max_context, server.kv_tokens // plan.max_batch) - _NEW_TOKENS - 16
        if room < _CONTEXTS[0]:
            raise InvalidRequestError(
                "kv_cache_bytes",
                f"holds {server.kv_tokens} tokens, too few for {plan.max_batch} requests; give --requests "
                "less or --serve-option kv-cache-bytes=… more",
            )
        self._contexts = sorted({min(context, room) for context in _CONTEXTS})
        self._prompts = [p for p in _PROMPTS if p + 2 <= server.max_context]

    @property
    def swap_seconds(self) -> float:
        """From host memory to a slot."""
        return max(0.0, statistics.median(self._first["host"]) - statistics.median(self._first["slot"]))

    @property
    def load_seconds(self) -> float:
        """From the store to host memory."""
        return max(0.0, statistics.median(self._first["store"]) - statistics.median(self._first["host"]))

    def warm_up(self) -> None:
        for name in self._names:
            self._send([self._ask(name, 16, 2)])
        for rows in self._batches():
            self._send([self._ask(self._names[row], 16, 4) for row in range(rows)])
        for prompt in self._prompts:
            self._send([self._ask(self._names[0], prompt, 2)])

    def round(self) -> None:
        for prompt in self._prompts:
            for _ in range(3):
                [answer] = self._send([self._ask(self._names[0], prompt, 1)])
                self._note(self._prefill(prompt), 1, [answer.ttft])
        for rows in self._batches():
            for context in self._contexts:
                for adapters in sorted({1, rows}):
                    self._decode(rows, context, adapters)
        self._tiers()

    def fit(self) -> Fit:
        observations = [
            Observation(steps, tuple(seconds), calls) for (steps, calls), seconds in self._seconds.items()
        ]
        knots = sorted({1, 8, 32, 128, self._plan.max_batch_tokens})
        longest = max(work.tokens for observation in observations for work in observation.steps)
        return fit(observations, [knot for knot in knots if knot <= max(longest, 1)])

    def _batches(self) -> list[int]:
        powers = [1 << power for power in range(self._plan.max_batch.bit_length())]
        return sorted({rows for rows in powers if rows <= self._plan.max_batch} | {self._plan.max_batch})

    def _prefill(self, prompt: int) -> tuple[Work, ...]:
        budget = self._plan.max_batch_tokens
        steps = []
        for start in range(0, prompt, budget):
            chunk = min(budget, prompt - start)
            last = start + chunk == prompt
            steps.append(Work(chunk, int(last), 1, pairs=chunk * (start + chunk / 2)))
        return tuple(steps)

    def _decode(self, rows: int, context: int, adapters: int) -> None:
        asks = [self._ask(self._names[row % adapters], context, _NEW_TOKENS) for row in range(rows)]
        answers = self._send(asks)
        # While all of them decode, and nobody's prompt is in a step.
        begin = max(answer.times[0] for answer in answers)
        end = min(answer.times[-1] for answer in answers)
        gaps = [
            b - a
            for answer in answers
            for a, b in zip(answer.times, answer.times[1:], strict=False)
            if a >= begin and b <= end
        ]
        if gaps:
            middle = context + _NEW_TOKENS / 2
            self._note((Work(rows, rows, adapters, context=rows * middle),), 0, gaps)

    def _tiers(self) -> None:
        """The first token of one whose adapter is in its slot, in host memory, in the store."""
        with grpc.insecure_channel(self._server.address) as channel:
            admin = adapters_pb2_grpc.AdapterServiceStub(channel)
            for name in self._names[: min(8, len(self._names))]:
                for tier, seconds in self._first.items():
                    if tier != "slot":
                        admin.UnloadAdapter(adapters_pb2.UnloadAdapterRequest(name=name))
                    if tier == "host":
                        admin.LoadAdapter(
                            adapters_pb2.LoadAdapterRequest(name=name, residency=adapters_pb2.RESIDENCY_HOST)
                        )
                    [answer] = self._send([self._ask(name, 16, 1)])
                    seconds.append(answer.ttft)

    def _note(self, steps: tuple[Work, ...], calls: int, seconds: list[float]) -> None:
        self._seconds.setdefault((steps, calls), []).extend(seconds)

    def _ask(self, name: str, prompt: int, new_tokens: int) -> Ask:
        ids = [self._random.randrange(2, self._vocab_size) for _ in range(prompt)]
        return Ask(name, ids, new_tokens)

    def _send(self, asks: list[Ask]) -> list[Answer]:
        return send([self._server], asks)


def print_costs(console: Any, costs: Costs) -> None:
    from rich.table import Table

    table = Table(title="What a server of this machine costs, as its clients see it")
    table.add_column("")
    table.add_column("ms", justify="right")
    for batch in (1, 8, 32):
        shown = costs.step.time(batch, batch, batch, 256 * batch, 0)
        table.add_row(f"a step that decodes {batch}, 256 tokens behind each", f"{shown * 1e3:.2f}")
    tokens = costs.step.tokens[-1]
    table.add_row(
        f"a step with a prompt of {tokens}", f"{costs.step.time(tokens, 1, 1, 0, tokens**2 / 2) * 1e3:.2f}"
    )
    table.add_row("a call, outside steps", f"{costs.call_seconds * 1e3:.2f}")
    table.add_row(
        f"an adapter of {costs.adapter_bytes / 1e6:.2f} MB from store to host",
        f"{costs.load_seconds * 1e3:.2f}",
    )
    table.add_row("from host memory to its slot", f"{costs.swap_seconds * 1e3:.2f}")
    console.print(table)
    console.print(
        f"{costs.prefill_tokens_per_second:,.0f} prompt tokens per second; the fit is off by "
        f"{costs.about['median_error_of_fit']:.1%} in the median, "
        f"{costs.about['largest_error_of_fit']:.1%} at most"
    )
