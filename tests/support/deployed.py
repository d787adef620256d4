"""A server over a store, as clients meet it: the plain one, or an application of Ray Serve."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from hotswap_server import app
from hotswap_server.config import load_settings

from support.serving import serving

RAY_CONFIG = Path(__file__).parents[2] / "deploy" / "ray" / "serve.yaml"
_START_S = 150.0


@contextmanager
def plain_server(settings: dict[str, Any]) -> Iterator[str]:
    """`hotswap serve` on a thread; its address."""
    started: Future[str] = Future()
    ended = threading.Event()

    async def serve() -> None:
        start = partial(app.serve, load_settings(**settings, port=0, metrics_port=0))
        async with serving(start) as server:
            started.set_result(server.ready.address)
            await asyncio.to_thread(ended.wait)

    def run() -> None:
        try:
            asyncio.run(serve())
        except BaseException as error:
            if started.done():
                raise
            started.set_exception(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield started.result(_START_S)
    finally:
        ended.set()
        thread.join()


@contextmanager
def ray_application(settings: dict[str, Any], directory: Path, *, num_replicas: int) -> Iterator[str]:
    """`serve run` of the deployed configuration with other settings; the address of Ray's proxy."""
    port = _free_port()
    config = yaml.safe_load(RAY_CONFIG.read_text())
    config["grpc_options"]["port"] = port
    config["http_options"] = {"host": "127.0.0.1", "port": _free_port()}
    [application] = config["applications"]
    application["args"] = settings
    [deployment] = application["deployments"]
    del deployment["autoscaling_config"]
    deployment |= {"num_replicas": num_replicas, "ray_actor_options": {"num_cpus": 1 / num_replicas}}
    file = directory / "serve.yaml"
    file.write_text(yaml.safe_dump(config))
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DISABLE_DASHBOARD": "1",
        "RAY_AUTH_MODE": "disabled",  # or it writes a key into the home directory
    }
    log = directory / "serve.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", "from ray.serve.scripts import cli; cli()", "run", str(file)],
            env=environment,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        _wait_healthy(process, f"localhost:{port}", log)
        yield f"localhost:{port}"
    finally:
        process.send_signal(signal.SIGINT)  # ends the application, then Ray
        with suppress(subprocess.TimeoutExpired):
            process.wait(60)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait_healthy(process: subprocess.Popen[bytes], address: str, log: Path) -> None:
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    until = time.monotonic() + _START_S
    with grpc.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        while time.monotonic() < until and process.poll() is None:
            with suppress(grpc.RpcError):
                if stub.Check(health_pb2.HealthCheckRequest(), timeout=10).status:
                    return
            time.sleep(0.5)
    raise RuntimeError(log.read_text()[-5000:])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
