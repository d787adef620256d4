"""Exit 0 if the server in this container answers SERVING over grpc.health.v1, 1 if not; for HEALTHCHECK.

Asked is localhost, without TLS, on the port of HOTSWAP_SERVE_HEALTH_PORT or else HOTSWAP_SERVE_PORT: a
container that listens elsewhere should set these variables instead of the flags, and one with TLS the former.
An argument, HOST:PORT, is asked instead.
"""

from __future__ import annotations

import os
import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

TIMEOUT_S = 5.0


def serving(target: str) -> bool:
    """Whether the server at `target` says that it serves; says why not on standard error."""
    with grpc.insecure_channel(target) as channel:
        try:
            health = health_pb2_grpc.HealthStub(channel)
            reply = health.Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S)
        except grpc.RpcError as error:
            print(f"{target}: {error.code().name}", file=sys.stderr)
            return False
    if reply.status != health_pb2.HealthCheckResponse.SERVING:
        print(f"{target}: {health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status)}", file=sys.stderr)
        return False
    return True


def main(arguments: list[str]) -> int:
    variables = ("HOTSWAP_SERVE_HEALTH_PORT", "HOTSWAP_SERVE_PORT")
    port = next(filter(None, map(os.environ.get, variables)), "50051")
    return 0 if serving(arguments[0] if arguments else f"localhost:{port}") else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
