"""The container's health check, against a health service on loopback."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

SCRIPT = Path(__file__).resolve().parents[2] / "deploy/healthcheck.py"
Status = health_pb2.HealthCheckResponse


@pytest.fixture
def service() -> Iterator[tuple[health.HealthServicer, int]]:
    servicer = health.HealthServicer()
    server = grpc.server(ThreadPoolExecutor(2))
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield servicer, port
    server.stop(None).wait()


def check(*arguments: str, **variables: str) -> tuple[int, str]:
    result = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], env=variables, capture_output=True, text=True, check=False
    )
    return result.returncode, result.stderr


def test_a_server_that_serves_is_healthy(service: tuple[health.HealthServicer, int]) -> None:
    servicer, port = service
    servicer.set("", Status.SERVING)
    assert check(f"127.0.0.1:{port}") == (0, "")


def test_the_port_is_the_servers_own_setting(service: tuple[health.HealthServicer, int]) -> None:
    servicer, port = service
    servicer.set("", Status.SERVING)
    assert check(HOTSWAP_SERVE_PORT=str(port)) == (0, "")
    assert check(HOTSWAP_SERVE_PORT="1", HOTSWAP_SERVE_HEALTH_PORT=str(port)) == (0, "")


def test_a_draining_server_is_not_healthy(service: tuple[health.HealthServicer, int]) -> None:
    servicer, port = service
    servicer.set("", Status.SERVING)
    servicer.enter_graceful_shutdown()
    assert check(f"127.0.0.1:{port}") == (1, f"127.0.0.1:{port}: NOT_SERVING\n")


def test_a_port_without_a_server_is_not_healthy(unused_tcp_port: int) -> None:
    target = f"127.0.0.1:{unused_tcp_port}"
    assert check(target) == (1, f"{target}: UNAVAILABLE\n")
