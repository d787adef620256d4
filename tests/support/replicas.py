"""Replicas of a server over the same base and store: in threads of this process, or as processes."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import grpc
from hotswap_server.app import Ready, load, run
from hotswap_server.config import load_settings

from support.running import wait_until


class Replica(Protocol):
    """A server that comes back at the same address."""

    target: str

    def start(self) -> None:
        """Start, and wait until it answers."""

    def stop(self) -> None:
        """Let it end what it has begun."""

    def kill(self) -> None:
        """Cut off what it has begun."""


@contextmanager
def replicas(
    kind: str, number: int, base: Path, store: Path, log: Path, **settings: Any
) -> Iterator[list[Any]]:
    """Started replicas of the kind `threads` or `processes`; those that still run are killed in the end."""
    common = {
        "base": str(base),
        "store": str(store),
        "threads": 1,
        "metrics_port": 0,
        "kv_cache_bytes": "8MiB",
    }
    made: list[Any] = []
    with _loop() as loop:
        for port in _free_ports(number):
            own = common | {"port": port} | settings
            made.append(
                _Inside(loop, own) if kind == "threads" else _Process(own, log / f"replica-{port}.log")
            )
        try:
            for replica in made:
                replica.start()
            yield made
        finally:
            for replica in made:
                replica.kill()


@dataclass
class _Inside:
    """A server on an event loop that all share. Killed, it stops: a `drain_timeout` of 0 cuts calls off."""

    loop: asyncio.AbstractEventLoop
    settings: dict[str, Any]
    _stop: asyncio.Event | None = None
    _ended: Future[None] | None = None
    _cut: bool = False

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.settings['port']}"

    def start(self) -> None:
        ready: Future[Ready] = Future()
        self._ended = asyncio.run_coroutine_threadsafe(self._serve(ready), self.loop)
        self._ended.add_done_callback(lambda ended: ready.done() or ready.set_exception(ended.exception()))
        ready.result(120)

    async def _serve(self, ready: Future[Ready]) -> None:
        self._stop = asyncio.Event()
        loaded = await asyncio.to_thread(load, load_settings(None, **self.settings))
        await run(loaded, ready.set_result, stop=self._stop)

    def stop(self) -> None:
        self._end()

    def kill(self) -> None:
        self._end()

    def _end(self) -> None:
        if self._ended is not None and self._stop is not None:
            self.loop.call_soon_threadsafe(self._stop.set)
            self._ended.result(120)
            self._ended = None


@dataclass
class _Process:
    settings: dict[str, Any]
    log: Path
    _process: subprocess.Popen[bytes] | None = field(default=None, init=False)

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.settings['port']}"

    def start(self) -> None:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("HOTSWAP_")}
        environment |= {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "HF_HUB_OFFLINE": "1"}
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in self.settings.items()]
        with self.log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "hotswap_server.cli", *flags],
                stdout=output,
                stderr=output,
                env=environment,
            )
        with grpc.insecure_channel(self.target) as channel:
            connected = grpc.channel_ready_future(channel)
            wait_until(lambda: connected.done() or self._process.poll() is not None, within=120)
            assert self._process.poll() is None, self.log.read_text()

    def stop(self) -> None:
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        self._end(signal.SIGKILL)

    def _end(self, number: signal.Signals) -> None:
        if self._process is not None:
            with suppress(ProcessLookupError):
                self._process.send_signal(number)
            self._process.wait(120)
            self._process = None


def _free_ports(number: int) -> list[int]:
    probes = [socket.socket() for _ in range(number)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [int(probe.getsockname()[1]) for probe in probes]
    for probe in probes:
        probe.close()
    return ports


@contextmanager
def _loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield loop
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
