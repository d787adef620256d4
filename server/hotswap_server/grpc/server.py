"""The grpc.aio server: services, health, reflection, limits, and how it stops."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

import grpc
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from hotswap.v1 import adapters_pb2, adapters_pb2_grpc, inference_pb2, inference_pb2_grpc

from hotswap_server.engine.service import EngineService
from hotswap_server.grpc.access import AccessInterceptor
from hotswap_server.grpc.adapters import AdapterServicer
from hotswap_server.grpc.encoding import InputEncoder
from hotswap_server.grpc.inference import InferenceServicer
from hotswap_server.grpc.interceptors import CallInterceptor
from hotswap_server.grpc.store_calls import StoreCalls
from hotswap_server.metrics import Metrics
from hotswap_server.security.access import Access
from hotswap_server.security.setup import Security
from hotswap_server.security.tls import ServerCertificates
from hotswap_server.tracing import Tracing

SERVICES: Final = (
    inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name,
    adapters_pb2.DESCRIPTOR.services_by_name["AdapterService"].full_name,
)

# For what still has to be sent after the last call has ended; health watchers are then cut off.
_STOP_GRACE_S = 1.0
_LEAVING_S = 60.0
_REFRESH_S = 1.0


logger = structlog.stdlib.get_logger(__name__)


class PortInUseError(OSError):
    """The address cannot be listened on."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where to listen; port 0 takes a free one."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Bound:
    """Ports that are listened on; 0 for a service that has no port of its own."""

    port: int
    admin: int = 0
    health: int = 0


class GrpcServer:
    """Serves an engine. `start`, then `stop`; both once, on the same event loop.

    `max_connection_age` is in seconds; a connection that is older takes no further calls.
    Health is on every port, the API's services on the first; AdapterService on that of `admin` instead, if
    given. The port of `health` has neither TLS nor another service.
    """

    def __init__(
        self,
        engine: EngineService,
        metrics: Metrics,
        *,
        max_message_bytes: int,
        max_timeout: float,
        max_calls: int = 4096,
        max_inflight_bytes: int = 256 << 20,
        store_timeout: float,
        security: Security | None = None,
        admin: Address | None = None,
        health_check: Address | None = None,
        reflect: bool = True,
        tracing: Tracing | None = None,
        max_connection_age: float | None = None,
    ) -> None:
        self._engine = engine
        self._security = security or Security(Access())
        self._encoder = InputEncoder(engine.tokenizer, engine.base.vocab_size)
        self._store = StoreCalls(store_timeout)
        self._calls = CallInterceptor(
            metrics,
            max_seconds=max_timeout,
            max_calls=max_calls,
            max_bytes=max_inflight_bytes,
            tracing=tracing,
        )
        self._guard = AccessInterceptor(self._security.access)
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]
        self._max_message_bytes = max_message_bytes
        self._max_connection_age = max_connection_age
        self._main = self._new_server()
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(
            InferenceServicer(engine, self._encoder, self._store), self._main
        )
        self._admin_address, self._admin = admin, self._main if admin is None else self._new_server()
        adapters_pb2_grpc.add_AdapterServiceServicer_to_server(
            AdapterServicer(engine.adapters, engine.merges, self._store, engine.calibrator), self._admin
        )
        self._health_address = health_check
        self._probed = None if health_check is None else self._new_server()
        if reflect:
            shared = (health.SERVICE_NAME, reflection.SERVICE_NAME)
            if self._admin is self._main:
                reflection.enable_server_reflection((*SERVICES, *shared), self._main)
            else:
                reflection.enable_server_reflection((SERVICES[0], *shared), self._main)
                reflection.enable_server_reflection((SERVICES[1], *shared), self._admin)
        self._refreshing: asyncio.Task[None] | None = None
        self._telling: set[asyncio.Future[None]] = set()

    def _new_server(self) -> grpc.aio.Server:
        age = self._max_connection_age
        server = grpc.aio.server(
            interceptors=[self._calls, self._guard],
            options=[
                ("grpc.max_receive_message_length", self._max_message_bytes),
                ("grpc.max_send_message_length", -1),
                ("grpc.so_reuseport", 0),  # a second server on the port is an error, not a partner
                ("grpc.keepalive_time_ms", 60_000),
                ("grpc.keepalive_timeout_ms", 20_000),
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
                *([] if age is None else [("grpc.max_connection_age_ms", max(1, round(age * 1000)))]),
            ],
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        return server

    @property
    def _servers(self) -> list[grpc.aio.Server]:
        servers = [self._main, *([] if self._admin is self._main else [self._admin])]
        return servers if self._probed is None else [*servers, self._probed]

    async def start(self, host: str, port: int) -> Bound:
        """Listen and answer.

        Raises:
            PortInUseError: an address is taken, or not this machine's.
        """
        certificates = self._security.certificates
        bound = _listen(self._main, Address(host, port), certificates)
        admin = probed = 0
        if self._admin_address is not None:
            admin = _listen(self._admin, self._admin_address, certificates)
        if self._probed is not None and self._health_address is not None:
            probed = _listen(self._probed, self._health_address, None)
        for service in ("", *SERVICES):
            await self._health.set(service, health_pb2.HealthCheckResponse.SERVING)
        self._engine.on_health = self._health_changed
        for server in self._servers:
            await server.start()
        if self._security.access.required:
            self._refreshing = asyncio.create_task(self._refresh())
        return Bound(bound, admin, probed)

    def _health_changed(self, sound: bool) -> None:
        """On the event loop. A server that stops stays NOT_SERVING; AdapterService needs no engine."""
        status = health_pb2.HealthCheckResponse
        answer = status.SERVING if sound else status.NOT_SERVING
        task = asyncio.ensure_future(self._set_health(answer))
        self._telling.add(task)
        task.add_done_callback(self._telling.discard)

    async def _set_health(self, answer: health_pb2.HealthCheckResponse.ServingStatus.ValueType) -> None:
        for service in ("", SERVICES[0]):
            await self._health.set(service, answer)

    async def _refresh(self) -> None:
        """Take over changes of the keys file, within a second."""
        while True:
            await asyncio.sleep(_REFRESH_S)
            try:
                await asyncio.to_thread(self._security.access.refresh)
            except Exception:  # or a key that is revoked later would stay valid
                logger.exception("keys_file_not_read")

    async def stop(self, drain_timeout: float) -> None:
        """Say NOT_SERVING, let running calls end within `drain_timeout` seconds, fail the rest, then close.

        Connections take no further calls from now on: whoever reaches this server through a balancer of
        connections then makes a new one, to another server, instead of being refused here until the end.
        Cancelling this task ends the waiting; `stop(0)` then closes at once.
        """
        await self._health.enter_graceful_shutdown()
        loop = asyncio.get_running_loop()
        deadline = loop.time() + drain_timeout
        # Their grace outlasts what follows, which is what ends them. Probes go on being answered.
        leaving = [
            asyncio.create_task(server.stop(drain_timeout + _LEAVING_S))
            for server in self._servers
            if drain_timeout and server is not self._probed
        ]
        try:
            await self._engine.drain(drain_timeout)
            await asyncio.to_thread(self._engine.close)
            # The engine is done; its last events may still be on their way to a caller who reads slowly.
            with suppress(TimeoutError):
                async with asyncio.timeout_at(max(deadline, loop.time() + _STOP_GRACE_S)):
                    await self._calls.wait_idle()
        finally:
            for task in leaving:
                task.cancel()
        grace = _STOP_GRACE_S if drain_timeout else None
        await asyncio.gather(*(server.stop(grace) for server in self._servers))
        if self._refreshing is not None:
            self._refreshing.cancel()
        self._encoder.close()
        self._store.close()


def _listen(server: grpc.aio.Server, address: Address, certificates: ServerCertificates | None) -> int:
    """The port, which is a free one if the address's is 0."""
    try:
        if certificates is None:
            return server.add_insecure_port(str(address))
        return server.add_secure_port(str(address), certificates.credentials())
    except RuntimeError as error:
        raise PortInUseError(f"cannot listen on {address}") from error
