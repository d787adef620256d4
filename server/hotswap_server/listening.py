"""Which addresses a server's settings name, and whether they are free."""

from __future__ import annotations

import socket
from typing import Final

from hotswap_server.config import ServeSettings
from hotswap_server.grpc.server import Address

_PORTS: Final = ("port", "metrics_port", "admin_port", "health_port")
_OPTIONAL: Final = frozenset(_PORTS[1:])


class PortError(ValueError):
    """A port cannot be listened on; `field` is its setting."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


def address_of(settings: ServeSettings, field: str) -> Address | None:
    """The address of the port that the setting `field` gives, or None if it gives none."""
    port = getattr(settings, field)
    return None if port is None else Address(_host(settings, field), port)


def shown(settings: ServeSettings, field: str, port: int) -> str:
    """The address that `port` is listened on; empty if it is 0, which stands for none."""
    return str(Address(_host(settings, field), port)) if port else ""


def check_ports(settings: ServeSettings) -> None:
    """Refuse a taken port before a base is loaded for minutes.

    Raises:
        PortError: a port is taken, or its host is not this machine's.
    """
    for field in _PORTS:
        address = address_of(settings, field)
        if address is not None and (address.port or field not in _OPTIONAL):
            _check(field, address)


def _host(settings: ServeSettings, field: str) -> str:
    return settings.admin_host or settings.host if field == "admin_port" else settings.host


def _check(field: str, address: Address) -> None:
    try:
        family, kind, protocol, _, name = socket.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(name)
    except OSError as error:
        reason = error.strerror or str(error)
        raise PortError(
            field, f"cannot listen on {address}: {reason}; give another --host or port"
        ) from error
