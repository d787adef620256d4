"""The two commands that the demo runs, `hotswap train` and `hotswap serve`: none of them outlives it."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import grpc
from hotswap.layout import version_path, versions_in
from hotswap.names import AdapterName

from hotswap_client.cli.demo.tasks import Task

HOTSWAP: tuple[str, ...] = (sys.executable, "-m", "hotswap_client.cli")
"""The command, in the interpreter that runs this one."""

HEALTHY_WITHIN_S = 180.0
END_WITHIN_S = 10.0
_EXTRAS = ("server", "trainer")


class DemoError(Exception):
    """The demo cannot go on. The message is one line with the remedy."""


@dataclass(frozen=True, slots=True)
class Trained:
    """The newest version of a task's adapter in the store, and what its `training.json` says."""

    version: int
    first_loss: float
    last_loss: float


def missing_packages() -> list[str]:
    """What the extras `server` and `trainer` name and this environment lacks."""
    missing = set()
    for requirement in metadata.requires("hotswap") or ():
        if any(re.search(rf"extra == ['\"]{extra}['\"]", requirement) for extra in _EXTRAS):
            match = re.match(r"[\w.-]+", requirement)
            try:
                metadata.version(match[0] if match else requirement)
            except metadata.PackageNotFoundError:
                missing.add(match[0] if match else requirement)
    return sorted(missing)


def find_trained(task: Task, base: str, store: Path) -> Trained | None:
    """The newest version of the task's adapter, if it was trained on this base, data and options."""
    name = AdapterName.parse(task.adapter)
    folder = store / name.tenant / name.name
    try:
        version = max(versions_in(path.name for path in folder.iterdir()))
        report = json.loads((version_path(store, name, version) / "training.json").read_text("utf-8"))
        used: dict[str, Any] = report["options"] | report["method_options"]
        wanted = {**task.training, "base": base}
        if report["data"]["sha256"] != task.train_digest() or any(
            used.get(key) != value for key, value in wanted.items()
        ):
            return None
        losses = [point["loss"] for point in report["loss"]["history"] if point["kind"] == "train"]
        return Trained(version, losses[0], losses[-1])
    except (OSError, ValueError, LookupError, TypeError):  # none there, or not by this trainer
        return None


def train(task: Task, base: str, store: Path) -> Trained:
    """Run `hotswap train` with its progress on our standard error.

    Raises:
        DemoError: it failed; it has said why on standard error.
    """
    options = {**task.training, "base": base, "data": task.train_file, "name": task.adapter, "output": store}
    flags = [part for key, value in options.items() for part in (f"--{key.replace('_', '-')}", str(value))]
    # An interrupted trainer mends the terminal, which a terminated one would leave without a cursor.
    with running([*HOTSWAP, "train", *flags], signal.SIGINT, stdout=subprocess.DEVNULL) as process:
        code = process.wait()
    if code != 0:
        raise DemoError(f"training {task.adapter} failed with exit code {code}; what it printed says why")
    trained = find_trained(task, base, store)
    if trained is None:
        raise DemoError(f"training {task.adapter} ended, but {store} has no such adapter; try --fresh")
    return trained


@contextmanager
def server(base: str, store: Path, *further: str) -> Iterator[str]:
    """A running, healthy `hotswap serve` with `further` flags; yields its HOST:PORT and drains it in the end.

    Raises:
        DemoError: it ended or did not become healthy in time; the message holds the last line of its log.
    """
    target = f"127.0.0.1:{_free_port()}"
    host, _, port = target.partition(":")
    flags = ["--base", base, "--store", str(store), "--host", host, "--port", port, "--metrics-port", "0"]
    flags += further
    with (
        tempfile.TemporaryFile() as log,
        running([*HOTSWAP, "serve", *flags], signal.SIGTERM, stdout=log, stderr=log) as process,
    ):
        _wait_until_healthy(process, target, log)
        yield target


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Within it SIGTERM and SIGHUP raise SystemExit, so that `finally` ends what was started."""

    def leave(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def running(
    command: Sequence[str], ending: signal.Signals, **options: Any
) -> Iterator[subprocess.Popen[bytes]]:
    """A process that gets the signal `ending` if it still runs at the end, and is killed if that is in vain.

    It has its own process group: a Ctrl-C in the terminal reaches us alone, and we end it in one way.
    """
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, process_group=0, **options)
    try:
        yield process
    finally:
        try:
            if process.poll() is None:
                process.send_signal(ending)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(END_WITHIN_S)
        finally:  # reached by a second Ctrl-C too
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _wait_until_healthy(process: subprocess.Popen[bytes], target: str, log: IO[bytes]) -> None:
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    until = time.monotonic() + HEALTHY_WITHIN_S
    with grpc.insecure_channel(target) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        while True:
            with suppress(grpc.RpcError):
                reply = health.Check(health_pb2.HealthCheckRequest(), timeout=1.0)
                if reply.status == health_pb2.HealthCheckResponse.SERVING:
                    return
            if (code := process.poll()) is not None:
                raise DemoError(f"the server ended with exit code {code}: {_last_line(log)}")
            if time.monotonic() > until:
                raise DemoError(
                    f"the server was not healthy after {HEALTHY_WITHIN_S:.0f} s; its last line: "
                    f"{_last_line(log)}"
                )
            time.sleep(0.1)


def _last_line(log: IO[bytes]) -> str:
    log.seek(0)
    lines = log.read().decode("utf-8", "replace").strip().splitlines()
    return lines[-1] if lines else "(it printed nothing)"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
