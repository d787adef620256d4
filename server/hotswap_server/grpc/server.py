"""The grpc.aio server: services, health, reflection, limits, and how it stops."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Final

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from hotswap.v1 import adapters_pb2, adapters_pb2_grpc, inference_pb2, inference_pb2_grpc

from hotswap_server.engine.service import EngineService
from hotswap_server.grpc.adapters import AdapterServicer
from hotswap_server.grpc.encoding import InputEncoder
from hotswap_server.grpc.inference import InferenceServicer
from hotswap_server.grpc.interceptors import CallInterceptor
from hotswap_server.grpc.store_calls import StoreCalls
from hotswap_server.metrics import Metrics

SERVICES: Final = (
    inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name,
    adapters_pb2.DESCRIPTOR.services_by_name["AdapterService"].full_name,
)

# For what still has to be sent after the last call has ended; health watchers are then cut off.
_STOP_GRACE_S = 1.0


class PortInUseError(OSError):
    """The address cannot be listened on."""


class GrpcServer:
    """Serves an engine. `start`, then `stop`; both once, on the same event loop."""

    def __init__(
        self,
        engine: EngineService,
        metrics: Metrics,
        *,
        max_message_bytes: int,
        max_timeout: float,
        store_timeout: float,
        reflect: bool = True,
    ) -> None:
        self._engine = engine
        self._encoder = InputEncoder(engine.tokenizer, engine.base.vocab_size)
        self._store = StoreCalls(store_timeout)
        self._calls = CallInterceptor(metrics, max_seconds=max_timeout)
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]
        self._server = grpc.aio.server(
            interceptors=[self._calls],
            options=[
                ("grpc.max_receive_message_length", max_message_bytes),
                ("grpc.max_send_message_length", -1),
                ("grpc.so_reuseport", 0),  # a second server on the port is an error, not a partner
                ("grpc.keepalive_time_ms", 60_000),
                ("grpc.keepalive_timeout_ms", 20_000),
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
            ],
        )
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(
            InferenceServicer(engine, self._encoder, self._store), self._server
        )
        adapters_pb2_grpc.add_AdapterServiceServicer_to_server(
            AdapterServicer(engine.adapters, self._store), self._server
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        if reflect:
            names = (*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, self._server)

    async def start(self, host: str, port: int) -> int:
        """Listen and answer; returns the port, which is a free one if `port` is 0.

        Raises:
            PortInUseError: the address is taken, or not this machine's.
        """
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            bound = self._server.add_insecure_port(address)
        except RuntimeError as error:
            raise PortInUseError(f"cannot listen on {address}") from error
        for service in ("", *SERVICES):
            await self._health.set(service, health_pb2.HealthCheckResponse.SERVING)
        await self._server.start()
        return bound

    async def stop(self, drain_timeout: float) -> None:
        """Say NOT_SERVING, let running calls end within `drain_timeout` seconds, fail the rest, then close.

        Cancelling this task ends the waiting; `stop(0)` then closes at once.
        """
        await self._health.enter_graceful_shutdown()
        loop = asyncio.get_running_loop()
        deadline = loop.time() + drain_timeout
        await self._engine.drain(drain_timeout)
        await asyncio.to_thread(self._engine.close)
        # The engine is done; its last events may still be on their way to a caller who reads slowly.
        with suppress(TimeoutError):
            async with asyncio.timeout_at(max(deadline, loop.time() + _STOP_GRACE_S)):
                await self._calls.wait_idle()
        await self._server.stop(_STOP_GRACE_S if drain_timeout else None)
        self._encoder.close()
        self._store.close()
