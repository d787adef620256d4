"""Several servers behind one client, by gRPC's own load balancing: who gets a call, and who is left out."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from typing import Any, Literal, get_args

Affinity = Literal["adapter"]

ADAPTER_KEY = "x-adapter"
"""Metadata of every call that names an adapter: its name without version or alias, percent-encoded."""

# gRPC hashes a header outside xDS only where this says so (https://github.com/grpc/proposal, A76).
_HASHING = "GRPC_EXPERIMENTAL_RING_HASH_SET_REQUEST_HASH_KEY"
_FAMILIES = {"ipv4": socket.AF_INET, "ipv6": socket.AF_INET6}


def one_target(targets: Sequence[str]) -> str:
    """The gRPC target of all `targets`.

    A single one may be of any kind, such as `dns:///NAME:PORT` with an address per replica, which gRPC looks
    up again when a connection breaks. Of several, each is HOST:PORT, and names are looked up here, once.

    Raises:
        ValueError: there is none, one is not HOST:PORT, or they have no addresses of one kind.
    """
    if isinstance(targets, str) or not targets:
        raise ValueError(f"targets must be a list of HOST:PORT with at least one, got {targets!r}")
    if len(targets) == 1:
        return targets[0]
    places = [_host_and_port(target) for target in targets]
    reasons = []
    for scheme, family in _FAMILIES.items():
        try:
            addresses = [found for host, port in places for found in _addresses(host, port, family)]
        except OSError as error:
            reasons.append(f"{scheme}: {error}")
            continue
        return f"{scheme}:{','.join(dict.fromkeys(addresses))}"
    raise ValueError(
        f"targets have no addresses of one kind ({'; '.join(reasons)}); give addresses, or a single name "
        "that has all of them, dns:///NAME:PORT"
    )


def service_config(affinity: Affinity | None) -> dict[str, Any]:
    """How calls are spread: by adapter, or in turn; and that servers which do not say SERVING get none.

    Raises:
        ValueError: gRPC is told by its environment not to hash headers.
    """
    policy: dict[str, Any] = {"round_robin": {}}
    if affinity is not None:
        # gRPC reads it whenever a channel gets its configuration, so it has to stay.
        if os.environ.setdefault(_HASHING, "true").lower() not in ("true", "t", "yes", "y", "1"):
            raise ValueError(f"affinity={affinity!r} needs {_HASHING}=true; it is {os.environ[_HASHING]!r}")
        policy = {"ring_hash_experimental": {"requestHashHeader": ADAPTER_KEY}}
    return {
        "loadBalancingConfig": [policy],
        "healthCheckConfig": {"serviceName": "hotswap.v1.InferenceService"},
    }


def channel_options() -> list[tuple[str, str | int]]:
    """A host that is gone without a word is noticed, and one that is back too; a name is looked up anew soon
    after a replica left."""
    return [
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.dns_min_time_between_resolutions_ms", 5_000),
        ("grpc.max_reconnect_backoff_ms", 5_000),
    ]


def check_affinity(affinity: Affinity | None, *, several: bool) -> None:
    """Raises ValueError for an unknown affinity, or one with nothing to choose from."""
    if affinity is None:
        return
    if affinity not in get_args(Affinity):
        raise ValueError(f"affinity must be {' or '.join(get_args(Affinity))}, got {affinity!r}")
    if not several:
        raise ValueError(f"affinity={affinity!r} needs targets; give the replicas there instead of a target")


def _host_and_port(target: str) -> tuple[str, int]:
    host, _, port = target.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or "/" in target or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ValueError(f"targets: each of several must be HOST:PORT, got {target!r}")
    return host, int(port)


def _addresses(host: str, port: int, family: socket.AddressFamily) -> list[str]:
    found = socket.getaddrinfo(host, port, family, socket.SOCK_STREAM)
    hosts = [str(place[0]) for *_, place in found]
    return [f"[{host}]:{port}" if family is socket.AF_INET6 else f"{host}:{port}" for host in hosts]
