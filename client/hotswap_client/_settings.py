"""What a client is told once: where the server is, how to be sure of it, and what every call carries."""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import grpc

from hotswap_client import _replicas
from hotswap_client._calls import Call, Default
from hotswap_client._replicas import Affinity
from hotswap_client._trace import trace_context

DEFAULT_TARGET = "localhost:50051"

MAX_MESSAGE_BYTES = 64 * 2**20
MAX_RETRIES = 4  # gRPC makes at most five attempts, whatever its service config says


@dataclass(frozen=True, slots=True)
class TLS:
    """Files in PEM form: the authority to trust (absent: the system's), and the client's own certificate and
    key where the server asks for one. `server_name` replaces the target's host in the certificate check."""

    ca: str | Path | None = None
    cert: str | Path | None = None
    key: str | Path | None = None
    server_name: str | None = None

    def __post_init__(self) -> None:
        if (self.cert is None) != (self.key is None):
            raise ValueError("tls: cert and key go together; give both or neither")

    def credentials(self) -> grpc.ChannelCredentials:
        """Read the files. Raises OSError if one cannot be read."""
        ca, key, cert = (
            None if path is None else Path(path).read_bytes() for path in (self.ca, self.key, self.cert)
        )
        return grpc.ssl_channel_credentials(root_certificates=ca, private_key=key, certificate_chain=cert)


@dataclass(frozen=True, slots=True)
class Settings:
    """A client's checked settings. The API key stays out of its `repr`.

    `target` is gRPC's; where it stands for several servers, `targets` are what it was made of.

    Raises:
        ValueError: a value is wrong, or the key would cross a network in the clear without being allowed to.
    """

    target: str
    api_key: str | None = field(repr=False)
    timeout: float | None
    retries: int
    tls: TLS | None
    allow_plaintext_key: bool = False
    targets: tuple[str, ...] = ()
    affinity: Affinity | None = None

    def __post_init__(self) -> None:
        _replicas.check_affinity(self.affinity, several=bool(self.targets))
        if len(self.targets) > 1 and self.tls is not None and self.tls.server_name is None:
            raise ValueError(
                "tls: several targets need a server_name that the certificate of each of them has, "
                "TLS(server_name=…)"
            )
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable()):
            raise ValueError("api_key must be printable ASCII without line breaks")
        if self.api_key is not None and self.tls is None and not (self.allow_plaintext_key or self._local):
            raise ValueError(
                f"api_key would be sent to {self.target} in the clear; use tls, or allow_plaintext_key if "
                "the network between is trusted"
            )
        if not 0 <= self.retries <= MAX_RETRIES:
            raise ValueError(f"retries must be between 0 and {MAX_RETRIES}, got {self.retries}")

    @classmethod
    def of(
        cls,
        target: str | None,
        api_key: str | None,
        timeout: float | None,
        retries: int,
        tls: TLS | bool,
        allow_plaintext_key: bool,
        targets: Sequence[str] | None,
        affinity: Affinity | None,
    ) -> Settings:
        files = (TLS() if tls else None) if isinstance(tls, bool) else tls
        if targets is None:
            given: tuple[str, ...] = ()
            target = DEFAULT_TARGET if target is None else target
        elif target is not None:
            raise ValueError("target and targets exclude one another; give one server, or several")
        else:
            target, given = _replicas.one_target(targets), tuple(targets)
        return cls(target, api_key, timeout, retries, files, allow_plaintext_key, given, affinity)

    @property
    def _local(self) -> bool:
        """Whether the target is certainly this machine."""
        return is_local(self.target)

    def describe(self) -> str:
        """The arguments of a client's `repr`."""
        key = None if self.api_key is None else "***"
        where = (
            f"targets={list(self.targets)!r}, affinity={self.affinity!r}"
            if self.targets
            else f"{self.target!r}"
        )
        return f"{where}, api_key={key!r}, timeout={self.timeout}, tls={self.tls!r}"

    def call_options(self, call: Call[Any]) -> dict[str, Any]:
        """Timeout and metadata of a call, as gRPC's keywords."""
        timeout = self.timeout if isinstance(call.timeout, Default) else call.timeout
        return {"timeout": timeout, "metadata": self._metadata(call.adapter)}

    def _metadata(self, adapter: str) -> tuple[tuple[str, str], ...]:
        """What a call carries: the adapter's name for whoever routes by it, the trace, the API key."""
        # All versions of an adapter belong together. Calls for the base have no name, and so are spread.
        # Metadata is ASCII; a plain `tenant/name` stays as it is.
        name = quote(adapter.partition("@")[0], safe="/")
        carried = (*(((_replicas.ADAPTER_KEY, name),) if name else ()), *trace_context())
        if self.api_key is None:
            return carried
        return (*carried, ("authorization", f"Bearer {self.api_key}"))

    def channel_options(self) -> list[tuple[str, str | int]]:
        """gRPC's own retries: they end with the first message received, so no output is ever repeated."""
        options: list[tuple[str, str | int]] = [
            ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
            ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
            ("grpc.enable_retries", int(self.retries > 0)),
            ("grpc.primary_user_agent", "hotswap-client"),
        ]
        if self.api_key is not None and self._local:
            options.append(("grpc.enable_http_proxy", 0))  # or a proxy of the environment would see the key
        config = _retry_config(self.retries + 1) if self.retries > 0 else {}
        if self.targets:
            config |= _replicas.service_config(self.affinity)
            options += _replicas.channel_options()
        if len(self.targets) > 1 and self.tls is None:
            options.append(("grpc.default_authority", self.targets[0]))  # a list would not be a host's name
        if config:
            options.append(("grpc.service_config", json.dumps(config)))
        if self.tls is not None and self.tls.server_name is not None:
            options.append(("grpc.ssl_target_name_override", self.tls.server_name))
        return options


def is_local(target: str) -> bool:
    """Whether a gRPC target (https://grpc.github.io/grpc/core/md_doc_naming.html) is certainly this machine:
    localhost, a loopback address or a Unix socket."""
    scheme, colon, rest = target.partition(":")
    if colon and scheme in ("unix", "unix-abstract"):
        return True
    if colon and scheme in ("dns", "ipv4", "ipv6"):
        # dns:[//AUTHORITY/]HOST, where the authority is a name server; the other two list addresses.
        target = rest.removeprefix("///")
    return all(_is_loopback(_host_of(address)) for address in target.split(","))


def _host_of(address: str) -> str:
    """The host of `HOST`, `HOST:PORT`, `[IPV6]`, `[IPV6]:PORT` or a bare IPv6 address."""
    if address.startswith("["):
        return address[1:].partition("]")[0]
    return address.partition(":")[0] if address.count(":") == 1 else address


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _retry_config(max_attempts: int) -> dict[str, Any]:
    policy = {
        "maxAttempts": max_attempts,
        "initialBackoff": "0.1s",
        "maxBackoff": "2s",
        "backoffMultiplier": 2,
        "retryableStatusCodes": ["UNAVAILABLE"],
    }
    services = [{"service": f"hotswap.v1.{name}"} for name in ("InferenceService", "AdapterService")]
    return {"methodConfig": [{"name": services, "retryPolicy": policy}]}
