"""`hotswap serve` as processes, and requests that are sent to them when they are due."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

import grpc
from hotswap.v1 import common_pb2, inference_pb2, inference_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families

from hotswap_server.errors import HotswapError

READY_WITHIN_S: Final = 600.0  # a large base on a GPU compiles and records first
_END_WITHIN_S: Final = 30.0


class ServerProcessError(HotswapError):
    """A server that was started to be measured ended, or was not ready in time."""


@dataclass(frozen=True, slots=True)
class Served:
    """A server that is ready."""

    address: str
    metrics_port: int
    kv_tokens: int
    max_context: int

    def metrics(self) -> dict[str, float]:
        """Its metrics by name, summed over labels; of histograms the sums and counts."""
        url = f"http://127.0.0.1:{self.metrics_port}/metrics"
        with urllib.request.urlopen(url, timeout=30) as reply:
            text = reply.read().decode()
        found: dict[str, float] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                found[sample.name] = found.get(sample.name, 0.0) + sample.value
        return found


@contextmanager
def served(base: Path, store: Path, *options: str) -> Iterator[Served]:
    """A `hotswap serve` on a free port of loopback; it ends with the block.

    Raises:
        ServerProcessError: it did not get ready. The message holds its last line.
    """
    metrics_port = _free_port()
    command = [sys.executable, "-m", "hotswap_server.cli", "--base", str(base), "--store", str(store)]
    command += ["--port", "0", "--metrics-port", str(metrics_port), *options]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HOTSWAP_SERVE_")}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, process_group=0
        )
        try:
            banner = _wait_until_ready(process, log)
            tokens, context = re.findall(r"^KV cache +([\d,]+) tokens; up to ([\d,]+)", banner, re.M)[0]
            [address] = re.findall(r"^address +(\S+)", banner, re.M)
            yield Served(address, metrics_port, int(tokens.replace(",", "")), int(context.replace(",", "")))
        finally:
            _end(process)


@dataclass(frozen=True, slots=True)
class Answer:
    """When a request was due, and when each of its tokens arrived, by `time.perf_counter`."""

    due: float
    times: list[float]

    @property
    def ttft(self) -> float:
        return self.times[0] - self.due

    @property
    def gaps(self) -> list[float]:
        return [b - a for a, b in zip(self.times, self.times[1:], strict=False)]


@dataclass(frozen=True, slots=True)
class Ask:
    """A request for `new_tokens` after `prompt`, `after` seconds from the start, at one of the servers."""

    adapter: str
    prompt: Sequence[int]
    new_tokens: int
    after: float = 0.0
    server: int = 0


def send(servers: Sequence[Served], asks: Sequence[Ask]) -> list[Answer]:
    """Send every request when it is due, whatever became of the others; their answers in the same order.

    Raises:
        grpc.RpcError: one failed.
    """
    return asyncio.run(_send(servers, asks))


async def _send(servers: Sequence[Served], asks: Sequence[Ask]) -> list[Answer]:
    channels = [grpc.aio.insecure_channel(server.address) for server in servers]
    try:
        for channel in channels:
            await channel.channel_ready()
        stubs = [inference_pb2_grpc.InferenceServiceStub(channel) for channel in channels]
        started = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(_ask(stubs[ask.server], ask, started)) for ask in asks]
        return [task.result() for task in tasks]
    finally:
        for channel in channels:
            await channel.close(grace=None)


async def _ask(stub: inference_pb2_grpc.InferenceServiceAsyncStub, ask: Ask, started: float) -> Answer:
    request = inference_pb2.GenerateStreamRequest(
        adapter=ask.adapter,
        input=common_pb2.Input(token_ids=common_pb2.TokenIds(ids=ask.prompt)),
        sampling=inference_pb2.SamplingParams(
            max_new_tokens=ask.new_tokens, temperature=0.0, ignore_eos=True
        ),
    )
    due = started + ask.after
    await asyncio.sleep(max(0.0, due - time.perf_counter()))
    times: list[float] = []
    async for message in stub.GenerateStream(request, timeout=600):
        times += [time.perf_counter()] * len(message.delta.token_ids)
    return Answer(due, times)


def _wait_until_ready(process: subprocess.Popen[bytes], log: IO[str]) -> str:
    until = time.monotonic() + READY_WITHIN_S
    while True:
        # Read through a descriptor of our own: the process shares the position of `log`.
        text = os.pread(log.fileno(), 1 << 20, 0).decode("utf-8", "replace")
        if re.search(r"^ready in ", text, re.M):
            return text
        ended, late = process.poll() is not None, time.monotonic() > until
        if ended or late:
            last = (text.strip().splitlines() or ["(it printed nothing)"])[-1]
            what = f"ended with exit code {process.returncode}" if ended else "was not ready in time"
            raise ServerProcessError(f"the server {what}; its last line: {last}")
        time.sleep(0.05)


def _end(process: subprocess.Popen[bytes]) -> None:
    try:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(_END_WITHIN_S)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
