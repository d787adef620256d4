"""Where a key may be sent without encryption."""

from __future__ import annotations

import asyncio

import pytest
from hotswap_client import TLS, AsyncClient, Client
from hotswap_client._settings import is_local
from typer.testing import CliRunner

LOCAL = (
    *("localhost:50051", "localhost", "LOCALHOST:1", "127.0.0.1:1", "127.1.2.3", "[::1]:1", "[::1]", "::1"),
    *("unix:/run/hotswap.sock", "unix:///run/hotswap.sock", "unix-abstract:hotswap", "dns:localhost:1"),
    *("dns:///localhost:1", "ipv4:127.0.0.1:1", "ipv4:127.0.0.1:1,127.0.0.2:1", "ipv6:[::1]:1"),
)
ELSEWHERE = (
    *("example.com:50051", "10.0.0.1:1", "0.0.0.0:1", "[::]:1", "[2001:db8::1]:1", "localhost.example:1", ""),
    *(
        "dns:///example.com:1",
        "dns://192.0.2.1/localhost:1",
        "ipv4:127.0.0.1:1,192.0.2.1:1",
        "xds:///localhost",
    ),
    *("example.com/localhost:1", "ipv6:[2001:db8::1]:1", "vsock:1:1"),
)


@pytest.mark.parametrize("target", LOCAL)
def test_targets_that_are_this_machine(target):
    assert is_local(target)


@pytest.mark.parametrize("target", ELSEWHERE)
def test_targets_that_may_be_another(target):
    assert not is_local(target)


def test_a_key_goes_elsewhere_only_encrypted_or_where_that_is_allowed(tmp_path):
    for client in (Client, AsyncClient):
        with pytest.raises(ValueError, match="allow_plaintext_key"):
            client("example.com:1", api_key="s3cret")

    def closed(client):
        client.close()

    closed(Client("example.com:1"))
    closed(Client("example.com:1", api_key="s3cret", tls=True))
    closed(Client("example.com:1", api_key="s3cret", tls=TLS(server_name="x")))
    closed(Client("example.com:1", api_key="s3cret", allow_plaintext_key=True))
    closed(Client("localhost:1", api_key="s3cret"))

    async def asynchronous():
        async with AsyncClient("example.com:1", api_key="s3cret", allow_plaintext_key=True):
            pass

    asyncio.run(asynchronous())


def test_the_message_of_the_refusal_holds_no_key():
    with pytest.raises(ValueError, match=r"example\.com:1") as caught:
        Client("example.com:1", api_key="s3cret")
    assert "s3cret" not in str(caught.value)


def test_a_key_for_this_machine_passes_no_proxy():
    with Client("localhost:1", api_key="s3cret") as client:
        assert ("grpc.enable_http_proxy", 0) in client._settings.channel_options()
    with Client("localhost:1") as client:
        assert ("grpc.enable_http_proxy", 0) not in client._settings.channel_options()


def test_the_command_says_which_flags_help():
    from hotswap_client.cli._app import app

    result = CliRunner().invoke(app, ["adapters", "list", "--target", "example.com:1", "--api-key", "s3cret"])
    assert result.exit_code == 2
    assert "s3cret" not in result.output
    help_ = CliRunner().invoke(app, ["adapters", "list", "--help"], env={"COLUMNS": "200"}).stdout
    assert "--allow-plaintext-key" in help_
