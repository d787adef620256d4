"""TLS and mTLS on loopback, and what changes while the server runs."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime, timedelta

import grpc
import pytest
from hotswap.v1 import adapters_pb2, common_pb2, inference_pb2, inference_pb2_grpc
from hotswap_client import TLS, AsyncClient, Unavailable
from hotswap_server.security.tls import ServerCertificates, TLSFiles
from support.certificates import Authority
from support.keys import Keyring

Code = grpc.StatusCode
REQUEST = inference_pb2.TokenizeRequest(input=common_pb2.Input(prompt="abc"))


@pytest.fixture(scope="module")
def authority():
    return Authority()


@pytest.fixture
def keyring(tmp_path):
    return Keyring(tmp_path / "keys.yaml")


@pytest.fixture
def files(authority, tmp_path):
    authority.issue("server", "localhost", "127.0.0.1").write(tmp_path, "server")
    (tmp_path / "ca.crt").write_bytes(authority.cert)
    return TLSFiles(tmp_path / "server.crt", tmp_path / "server.key")


@pytest.fixture
def mutual(files, tmp_path):
    return TLSFiles(files.cert, files.key, tmp_path / "ca.crt")


async def tokenize(target: str, credentials: grpc.ChannelCredentials | None, metadata=None) -> str | Code:
    """`ok`, or the code of the failure, on a connection of its own."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    channel = (
        grpc.aio.insecure_channel(target, options)
        if credentials is None
        else grpc.aio.secure_channel(target, credentials, options)
    )
    async with channel:
        try:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            await stub.Tokenize(REQUEST, metadata=metadata, timeout=20)
        except grpc.aio.AioRpcError as error:
            return error.code()
        return "ok"


async def eventually(condition) -> None:
    until = time.monotonic() + 20
    while not await condition():
        assert time.monotonic() < until, "it never came true"
        await asyncio.sleep(0.1)


async def test_tls_is_for_those_who_trust_the_authority(serving, keyring, files, authority):
    metadata = keyring.add("acme")
    security = keyring.security(certificates=ServerCertificates(files))
    trusting = grpc.ssl_channel_credentials(authority.cert)
    async with serving(security=security, credentials=trusting) as s:
        target = f"localhost:{s.bound.port}"
        await s.inference.Tokenize(REQUEST, metadata=metadata)
        assert await tokenize(target, trusting) is Code.UNAUTHENTICATED
        assert await tokenize(target, None, metadata) is Code.UNAVAILABLE
        stranger = grpc.ssl_channel_credentials(Authority("another").cert)
        assert await tokenize(target, stranger, metadata) is Code.UNAVAILABLE


async def test_a_certificate_of_the_authority_is_needed_and_names_the_caller(
    serving, keyring, mutual, authority, refusal_of
):
    keyring.add_certificate("svc.acme.internal", "acme", "user", "acme/*")
    keyring.add_certificate("spiffe://globex/svc", "globex", "publisher", "globex/*")
    keyring.add_certificate("only a common name", "plain", "admin", "*")
    security = keyring.security(certificates=ServerCertificates(mutual))

    def presenting(pair):
        return grpc.ssl_channel_credentials(authority.cert, pair.key, pair.cert)

    acme = authority.issue("irrelevant", "x.internal", "svc.acme.internal")
    async with serving(security=security, credentials=presenting(acme)) as s:
        target = f"localhost:{s.bound.port}"
        for name in ("acme/one", "globex/two"):
            s.engine.adapters.add(name)
        listed = await s.admin.ListAdapters(adapters_pb2.ListAdaptersRequest())
        assert [adapter.name for adapter in listed.adapters] == ["acme/one"]
        load = adapters_pb2.LoadAdapterRequest(name="acme/one")
        assert (await refusal_of(s.admin.LoadAdapter(load))).code is Code.PERMISSION_DENIED
        for pair in (authority.issue("x", "spiffe://globex/svc"), authority.issue("only a common name")):
            assert await tokenize(target, presenting(pair)) == "ok"
        unlisted = authority.issue("acme", "svc.acme.internal.example")
        assert await tokenize(target, presenting(unlisted)) is Code.UNAUTHENTICATED
        assert await tokenize(target, presenting(unlisted), keyring.add("late")) is Code.UNAUTHENTICATED
        assert await tokenize(target, grpc.ssl_channel_credentials(authority.cert)) is Code.UNAVAILABLE
        forged = Authority("test authority").issue("x", "svc.acme.internal")
        assert await tokenize(target, presenting(forged)) is Code.UNAVAILABLE


async def test_new_connections_get_the_rotated_certificate_and_old_ones_go_on(serving, files, authority):
    from hotswap_server.security.access import Access
    from hotswap_server.security.setup import Security

    new_authority = Authority("new")
    old, new = (grpc.ssl_channel_credentials(each.cert) for each in (authority, new_authority))
    security = Security(Access(), ServerCertificates(files))
    async with serving(security=security, credentials=old) as s:
        target = f"localhost:{s.bound.port}"
        await s.inference.Tokenize(REQUEST)
        assert await tokenize(target, new) is Code.UNAVAILABLE
        rotated = new_authority.issue("server", "localhost")
        files.cert.write_bytes(rotated.cert)
        assert await tokenize(target, old) == "ok"  # half a rotation changes nothing
        files.key.write_bytes(rotated.key)
        assert await tokenize(target, new) == "ok"
        assert await tokenize(target, old) is Code.UNAVAILABLE
        await s.inference.Tokenize(REQUEST)


async def test_keys_are_revoked_added_and_expire_while_the_server_runs(serving, keyring):
    metadata = keyring.add("acme")
    brief = keyring.add("brief", expires=datetime.now(UTC) + timedelta(seconds=2))
    async with serving(security=keyring.security()) as s:
        target = f"localhost:{s.bound.port}"

        async def answers(with_metadata, expected):
            return await tokenize(target, None, with_metadata) == expected

        assert await answers(metadata, "ok")
        call = s.inference.GenerateStream(
            inference_pb2.GenerateStreamRequest(input=common_pb2.Input(prompt="x")), metadata=metadata
        )
        await call.read()
        keyring.revoke("acme")
        second = keyring.add("acme")
        await eventually(lambda: answers(second, "ok"))
        assert await answers(metadata, Code.UNAUTHENTICATED)
        while (message := await call.read()) is not grpc.aio.EOF:
            last = message
        assert last.HasField("completion")
        await eventually(lambda: answers(brief, Code.UNAUTHENTICATED))


async def test_keys_are_still_revoked_after_a_reading_that_failed(serving, keyring, monkeypatch):
    metadata = keyring.add("acme")
    security = keyring.security()
    async with serving(security=security) as s:
        refresh, failed = security.access.refresh, asyncio.Event()
        loop = asyncio.get_running_loop()

        def fail():
            monkeypatch.setattr(security.access, "refresh", refresh)
            loop.call_soon_threadsafe(failed.set)
            raise RuntimeError("nobody expects this")

        monkeypatch.setattr(security.access, "refresh", fail)
        await failed.wait()
        keyring.revoke("acme")

        async def refused():
            return await tokenize(f"localhost:{s.bound.port}", None, metadata) is Code.UNAUTHENTICATED

        await eventually(refused)


async def test_limits_answer_resource_exhausted_with_the_time_to_wait(serving, keyring, refusal_of):
    slow = keyring.add("slow", requests_per_second=0.5)
    few_tokens = keyring.add("few", tokens_per_minute=5)
    one = keyring.add("one", concurrent_requests=1)
    free = keyring.add("free")
    async with serving(security=keyring.security()) as s:
        await s.inference.Tokenize(REQUEST, metadata=slow)
        refusal = await refusal_of(s.inference.Tokenize(REQUEST, metadata=slow))
        assert (refusal.code, refusal.details["ErrorInfo"].reason) == (
            Code.RESOURCE_EXHAUSTED,
            "RATE_LIMITED",
        )
        assert 1 < refusal.details["RetryInfo"].retry_delay.ToTimedelta().total_seconds() <= 2
        generate = inference_pb2.GenerateRequest(input=common_pb2.Input(prompt="abc"))
        await s.inference.Generate(generate, metadata=few_tokens)  # 3 read and 3 generated: 1 too many
        refusal = await refusal_of(s.inference.Generate(generate, metadata=few_tokens))
        assert refusal.code is Code.RESOURCE_EXHAUSTED
        assert 20 < refusal.details["RetryInfo"].retry_delay.ToTimedelta().total_seconds() <= 24
        s.engine.pause, s.engine.num_tokens = 0.05, 10_000
        stream = inference_pb2.GenerateStreamRequest(input=common_pb2.Input(prompt="abc"))
        running = s.inference.GenerateStream(stream, metadata=one)
        await running.read()
        refusal = await refusal_of(s.inference.GenerateStream(stream, metadata=one).read())
        assert refusal.code is Code.RESOURCE_EXHAUSTED
        assert "RetryInfo" in refusal.details
        running.cancel()
        await s.engine.ended_early.wait()
        await s.inference.Tokenize(REQUEST, metadata=free)

        async def again():
            return await tokenize(f"localhost:{s.bound.port}", None, one) == "ok"

        await eventually(again)


async def test_a_stream_that_is_left_early_has_cost_what_it_gave(serving, keyring, refusal_of):
    metadata = keyring.add("acme", tokens_per_minute=8)
    async with serving(security=keyring.security()) as s:
        s.engine.pause, s.engine.num_tokens = 0.01, 10_000
        stream = inference_pb2.GenerateStreamRequest(input=common_pb2.Input(prompt="abc"))
        call = s.inference.GenerateStream(stream, metadata=metadata)
        for _ in range(6):
            await call.read()
        call.cancel()
        refusal = await refusal_of(s.inference.GenerateStream(stream, metadata=metadata).read())
        assert refusal.details["ErrorInfo"].reason == "RATE_LIMITED"


async def test_the_client_speaks_both(serving, keyring, mutual, authority, tmp_path):
    keyring.add_certificate("svc.acme.internal", "acme")
    metadata = keyring.add("by-key")
    cert, key = authority.issue("x", "svc.acme.internal").write(tmp_path, "client")
    security = keyring.security(certificates=ServerCertificates(mutual))
    async with serving(security=security) as s:
        tls = TLS(ca=tmp_path / "ca.crt", cert=cert, key=key)
        target = f"localhost:{s.bound.port}"
        async with AsyncClient(target, tls=tls) as client:
            assert (await client.tokenize(prompt="abc")).token_ids == (97, 98, 99)
        ((_, value),) = metadata
        async with AsyncClient(target, tls=tls, api_key=value.removeprefix("Bearer ")) as client:
            assert (await client.generate(prompt="abc")).text == "ABC"
        async with AsyncClient(target, tls=TLS(ca=tmp_path / "ca.crt"), retries=0) as client:
            with pytest.raises(Unavailable):
                await client.tokenize(prompt="abc")
