"""The whole server with TLS, client certificates, keys and an admin port, over a tiny base."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import time
from contextlib import asynccontextmanager
from functools import partial
from types import SimpleNamespace

import pytest
from hotswap_client import (
    TLS,
    AsyncClient,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
    Unimplemented,
)
from hotswap_server import app
from hotswap_server.config import load_settings
from structlog.testing import capture_logs
from support.certificates import Authority
from support.keys import Keyring
from support.serving import serving

HUGE = 3 << 30


@pytest.fixture(scope="module")
def store(tmp_path_factory, write_lora):
    place = tmp_path_factory.mktemp("place")
    directory = place / "store"
    for seed, name in enumerate(("acme/one", "globex/two", "outside/secret")):
        write_lora((place if name.startswith("outside") else directory) / name / "1", seed=seed)
    os.symlink(place / "outside", directory / "outside")
    (directory / "acme/linked").mkdir()
    os.symlink(place / "outside/secret/1", directory / "acme/linked/1")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        # Sparse: the files take no space, and reading one would take memory and minutes.
        target = directory / "acme" / f"huge-{name.partition('.')[0][8:]}" / "1"
        target.mkdir(parents=True)
        for file in (directory / "acme/one/1").iterdir():
            (target / file.name).write_bytes(file.read_bytes())
        with open(target / name, "r+b") as opened:
            opened.truncate(HUGE)
    return directory


@pytest.fixture(scope="module")
def authority():
    return Authority()


@pytest.fixture
def keyring(tmp_path):
    return Keyring(tmp_path / "keys.yaml")


@pytest.fixture
def secured(tiny_base, store, authority, keyring, tmp_path):
    """`async with secured(**flags) as s`; `s.client(…)` is a client of it, `s.admin(…)` of its admin port."""
    cert, key = authority.issue("server", "localhost", "127.0.0.1").write(tmp_path, "server")
    (tmp_path / "ca.crt").write_bytes(authority.cert)

    trusting = TLS(ca=tmp_path / "ca.crt")

    @asynccontextmanager
    async def serve(**flags):
        options = {"base": tiny_base, "store": store, "kv_cache_bytes": "1MiB", "threads": 1}
        options |= {"port": 0, "metrics_port": 0, "admin_port": 0, "tls_cert": cert, "tls_key": key}
        given = {name: str(value) for name, value in (options | {"keys_file": keyring.path} | flags).items()}
        async with serving(partial(app.serve, load_settings(**given))) as server:
            described = server.ready

            def client(api_key=None, *, address=described.address, tls=trusting):
                return AsyncClient(address, api_key=api_key, tls=tls, retries=0, timeout=60)

            def admin(api_key=None):
                return client(api_key, address=described.admin_address)

            yield SimpleNamespace(ready=described, client=client, admin=admin)

    return serve


def key_of(metadata) -> str:
    ((_, value),) = metadata
    return value.removeprefix("Bearer ")


async def test_each_tenant_uses_its_own_over_tls(secured, keyring):
    acme, globex = (
        key_of(keyring.add("acme", "user", "acme/*")),
        key_of(keyring.add("globex", "user", "globex/*")),
    )
    async with secured() as s:
        assert s.ready.security == "TLS, known callers only"
        async with s.client(acme) as client:
            answer = await client.generate(adapter="acme/one", prompt="hello", max_new_tokens=4)
            assert answer.adapter == "acme/one"
            assert (await client.generate(prompt="hello", max_new_tokens=4)).adapter is None
            for name in ("globex/two", "globex/none", "outside/secret"):
                with pytest.raises(NotFound, match=f"the store has no adapter {name}$"):
                    await client.generate(adapter=name, prompt="hello")
        async with s.client(globex) as client:
            stream = client.stream(adapter="globex/two", prompt="hello", max_new_tokens=4)
            deltas = [delta async for delta in stream]
            assert deltas[-1].result.adapter == "globex/two"
        async with s.client() as stranger:
            with pytest.raises(Unauthenticated):
                await stranger.generate(prompt="hello")
        async with s.client(acme, tls=False) as plain:
            with pytest.raises(Unavailable):
                await plain.generate(prompt="hello")
        async with s.client(acme, tls=True) as other_authority:
            with pytest.raises(Unavailable):
                await other_authority.generate(prompt="hello")


async def test_adapters_are_managed_on_their_own_port_by_those_who_may(secured, keyring):
    admin = key_of(keyring.add("root", "admin", "*"))
    publisher, user = (key_of(keyring.add(role, role, "acme/*")) for role in ("publisher", "user"))
    async with (
        secured() as s,
        s.admin(admin) as a,
        s.admin(publisher) as p,
        s.admin(user) as u,
        s.client(admin) as c,
    ):
        with capture_logs() as logs:
            assert (await p.adapters.load("acme/one")).adapter.name == "acme/one"
            assert (await a.adapters.pin("globex/two")).pinned
            for call in (
                p.adapters.pin("acme/one"),
                u.adapters.load("acme/one"),
                p.adapters.merge("acme/one"),
            ):
                with pytest.raises(PermissionDenied):
                    await call
        assert {line["principal"] for line in logs if line["event"] == "admin_call"} == {
            "root",
            "publisher",
            "user",
        }
        assert {adapter.name.partition("/")[0] for adapter in await u.adapters.list()} == {"acme"}
        with pytest.raises(Unimplemented):
            await c.adapters.list()
        with pytest.raises(Unimplemented):
            await a.generate(prompt="hello")


async def test_client_certificates_of_the_authority_name_the_caller(secured, keyring, authority, tmp_path):
    keyring.add_certificate("svc.acme.internal", "acme", "user", "acme/*")
    ca = tmp_path / "ca.crt"

    def tls(name: str, issuer: Authority) -> TLS:
        cert, key = issuer.issue("x", f"{name}.acme.internal").write(tmp_path, name)
        return TLS(ca=ca, cert=cert, key=key)

    known, unlisted, forged = (
        tls("svc", authority),
        tls("other", authority),
        TLS(ca=ca, cert=tmp_path / "forged.crt", key=tmp_path / "forged.key"),
    )
    Authority("test authority").issue("x", "svc.acme.internal").write(tmp_path, "forged")
    async with secured(tls_client_ca=ca) as s:
        async with s.client(tls=known) as client:
            assert (await client.generate(adapter="acme/one", prompt="x", max_new_tokens=2)).version == 1
            with pytest.raises(NotFound):
                await client.generate(adapter="globex/two", prompt="x")
        for files, error in ((unlisted, Unauthenticated), (forged, Unavailable), (TLS(ca=ca), Unavailable)):
            async with s.client(tls=files) as client:
                with pytest.raises(error):
                    await client.generate(prompt="x")


async def test_a_quota_counts_real_tokens_and_says_when_it_is_paid(secured, keyring):
    acme = key_of(keyring.add("acme", "user", "acme/*", tokens_per_minute=30))
    async with secured() as s, s.client(acme) as client:
        await client.generate(prompt="x" * 20, max_new_tokens=20, ignore_eos=True, temperature=0.0)
        with pytest.raises(ResourceExhausted) as caught:
            await client.score(text="hello")
        assert caught.value.reason == "RATE_LIMITED"
        assert 15 < caught.value.retry_after <= 23  # 40 used of 30; one is needed, at half a token a second


async def test_nothing_outside_the_store_is_read_whatever_its_name(secured, keyring, store):
    root = key_of(keyring.add("root", "admin", "*"))
    async with secured() as s, s.client(root) as client, s.admin(root) as admin:
        for name in ("outside/secret", "acme/linked"):
            for call in (client.generate(adapter=name, prompt="x"), admin.adapters.load(name)):
                with pytest.raises(FailedPrecondition, match="out of the store") as caught:
                    await call
                assert str(store) not in str(caught.value)
        for name in (
            "../outside/secret",
            "acme/../../outside",
            str(store),
            "acme/one/../one",
            "acme/one\x00",
        ):
            with pytest.raises(InvalidArgument):
                await client.generate(adapter=name, prompt="x")


async def test_files_over_the_limit_are_refused_before_they_are_read(secured, keyring):
    root = key_of(keyring.add("root", "admin", "*"))
    async with secured() as s, s.client(root) as client, s.admin(root) as admin:
        for name in ("acme/huge-model", "acme/huge-config"):
            started = time.monotonic()
            for call in (client.generate(adapter=name, prompt="x"), admin.adapters.load(name)):
                with pytest.raises(FailedPrecondition, match=f"{HUGE} bytes, over the limit"):
                    await call
            assert time.monotonic() - started < 20  # reading 3 GiB twice would take longer, and the memory


async def test_a_wrong_pair_or_file_ends_the_start_in_one_line(secured, tmp_path):
    for flags, named in (
        ({"tls_key": tmp_path / "ca.crt"}, "--tls-cert"),
        ({"keys_file": tmp_path / "none.yaml"}, "--keys-file"),
        ({"tls_client_ca": tmp_path / "server.key"}, "--tls-client-ca"),
    ):
        with pytest.raises(app.StartupError, match=named) as caught:
            async with secured(**flags):
                pass
        assert "\n" not in str(caught.value)


async def test_old_protocols_are_refused(secured):
    async with secured() as s:
        port = s.ready.port

        def handshake(version: ssl.TLSVersion) -> str | None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            context.minimum_version = context.maximum_version = version
            context.set_alpn_protocols(["h2"])
            with (
                socket.create_connection(("localhost", port), 10) as raw,
                context.wrap_socket(raw) as wrapped,
            ):
                return wrapped.version()

        assert await asyncio.to_thread(handshake, ssl.TLSVersion.TLSv1_3) == "TLSv1.3"
        with pytest.warns(DeprecationWarning, match="TLSv1_1"), pytest.raises((ssl.SSLError, OSError)):
            await asyncio.to_thread(handshake, ssl.TLSVersion.TLSv1_1)
