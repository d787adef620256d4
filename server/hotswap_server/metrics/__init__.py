"""Prometheus metrics: base units, names under `hotswap_`, and the adapter's method as the label `method`.

docs/metrics.md lists them all.
"""

from hotswap_server.metrics.endpoint import MetricsServer
from hotswap_server.metrics.labels import UNKNOWN, error_reason, method_label
from hotswap_server.metrics.server import Metrics

__all__ = ["UNKNOWN", "Metrics", "MetricsServer", "error_reason", "method_label"]
