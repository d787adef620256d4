"""The endpoint that Prometheus reads."""

from __future__ import annotations

from threading import Thread
from wsgiref.simple_server import WSGIServer

from prometheus_client import start_http_server

from hotswap_server.metrics.server import Metrics


class MetricsServer:
    """Answers scrapes at `http://host:port/metrics` on a thread of its own, until it is closed."""

    def __init__(self, metrics: Metrics, host: str, port: int) -> None:
        """Raises OSError if the port is taken."""
        server_and_thread: tuple[WSGIServer, Thread] = start_http_server(port, host, metrics.registry)
        self._server, self._thread = server_and_thread
        self.port = int(self._server.server_port)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
