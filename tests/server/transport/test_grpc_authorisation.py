"""Who may call what: every call of the API, every role, own, foreign and absent adapters."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from hotswap.v1 import adapters_pb2, common_pb2, inference_pb2
from hotswap_server.adapters.residency import Residency
from hotswap_server.grpc.server import Address
from hotswap_server.security.principals import Role
from hotswap_server.security.rules import RULES
from structlog.testing import capture_logs
from support.keys import Keyring, bearer

Code = grpc.StatusCode
# The last two have one length, so that encoded messages with them differ by the names alone.
OWN, FOREIGN, ABSENT = "acme/one", "globex/two", "globex/not"

# What each call needs. A call that is missing here, or in the server's rules, fails the first test.
NEEDED = {
    "Generate": Role.USER,
    "GenerateStream": Role.USER,
    "Score": Role.USER,
    "Tokenize": Role.USER,
    "ListAdapters": Role.USER,
    "GetAdapter": Role.USER,
    "LoadAdapter": Role.PUBLISHER,
    "UnloadAdapter": Role.PUBLISHER,
    "PinAdapter": Role.ADMIN,
    "UnpinAdapter": Role.ADMIN,
    "MergeAdapter": Role.ADMIN,
    "UnmergeAdapter": Role.ADMIN,
    "CalibrateMethods": Role.ADMIN,
}
METHODS = {
    method.name: method
    for file in (inference_pb2, adapters_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}
ABOUT_ONE = [
    name for name, method in METHODS.items() if {"adapter", "name"} & set(method.input_type.fields_by_name)
]


def path_of(rpc: str) -> str:
    method = METHODS[rpc]
    return f"/{method.containing_service.full_name}/{rpc}"


def request_for(rpc: str, adapter: str) -> Any:
    message = GetMessageClass(METHODS[rpc].input_type)()
    for field in ("adapter", "name"):
        if field in message.DESCRIPTOR.fields_by_name:
            setattr(message, field, adapter)
    if "input" in message.DESCRIPTOR.fields_by_name:
        message.input.CopyFrom(common_pb2.Input(prompt="hello"))
    if rpc == "Score":
        message.text = "hello"
    return message


def call(channel: grpc.aio.Channel, rpc: str, request: Any, metadata: Any) -> Any:
    method = METHODS[rpc]
    reply = GetMessageClass(method.output_type)
    make = channel.unary_stream if method.server_streaming else channel.unary_unary
    made = make(path_of(rpc), type(request).SerializeToString, reply.FromString)(request, metadata=metadata)
    return made.read() if method.server_streaming else made


@pytest.fixture
def keyring(tmp_path):
    return Keyring(tmp_path / "keys.yaml")


@pytest.fixture
def principals(keyring):
    """Metadata by role; each role twice: for acme's adapters, and for none that is there."""
    return {role: keyring.add(f"acme-{role}", str(role), "acme/*") for role in Role}


@pytest.fixture
def guarded(serving, keyring, principals):
    """`async with guarded() as s`: a server with two tenants' adapters, callers of one of them."""

    def start(**options):
        return serving(security=keyring.security(), **options)

    return start


def stock(s: Any) -> list[str]:
    """Put in both tenants' adapters; gives the list of what the server asks about adapters from here on."""
    manager, asked = s.engine.adapters, []
    manager.add(OWN, residency=Residency.DEVICE)
    manager.add(FOREIGN, residency=Residency.DEVICE)

    def watched(name: str, method: Any) -> Any:
        def ask(*args: Any, **options: Any) -> Any:
            asked.append(name)
            return method(*args, **options)

        return ask

    for target in (manager, s.engine.merges):
        for name in dir(target):
            if not name.startswith("_") and callable(getattr(target, name)):
                setattr(target, name, watched(name, getattr(target, name)))
    return asked


def test_every_call_has_a_rule_that_names_its_adapter_field():
    assert set(NEEDED) == set(METHODS)
    assert set(RULES) == {path_of(rpc) for rpc in METHODS}
    for rpc, method in METHODS.items():
        fields = {"adapter", "name"} & set(method.input_type.fields_by_name)
        assert RULES[path_of(rpc)].adapter_field in (fields or {None}), rpc
        assert RULES[path_of(rpc)].role is NEEDED[rpc]


@pytest.mark.parametrize("rpc", METHODS)
async def test_who_shows_nothing_or_a_wrong_key_learns_nothing(guarded, refusal_of, rpc):
    async with guarded() as s:
        asked = stock(s)
        for metadata in (
            None,
            bearer("hs_0123456789abcdef_" + "x" * 43),
            bearer("x"),
            (("authorization", "x"),),
        ):
            refusals = [
                await refusal_of(call(s.channel, rpc, request_for(rpc, name), metadata))
                for name in (OWN, FOREIGN, ABSENT)
            ]
            assert {refusal.code for refusal in refusals} == {Code.UNAUTHENTICATED}
            assert len({refusal.message for refusal in refusals}) == 1
        assert asked == []
        assert s.engine.requests == []


@pytest.mark.parametrize("rpc", METHODS)
@pytest.mark.parametrize("role", Role)
async def test_the_matrix(guarded, principals, refusal_of, rpc, role):
    async with guarded() as s:
        asked = stock(s)

        async def attempt(name: str) -> tuple[Code, str, Any, list[str]]:
            """How the call ends, with the adapter's name left out, and what it asked of the manager."""
            asked.clear()
            try:
                reply = await call(s.channel, rpc, request_for(rpc, name), principals[role])
            except grpc.aio.AioRpcError as error:
                status = dict(error.trailing_metadata())["grpc-status-details-bin"]
                shown = error.details().replace(name, "NAME")
                return error.code(), shown, status.replace(name.encode(), b"NAME"), list(asked)
            return Code.OK, "", str(reply).replace(name, "NAME"), list(asked)

        own, foreign, absent = [await attempt(name) for name in (OWN, FOREIGN, ABSENT)]
        if role < NEEDED[rpc]:
            assert own[0] is foreign[0] is absent[0] is Code.PERMISSION_DENIED
            assert str(NEEDED[rpc]) in own[1]
            assert asked == []
            assert s.engine.requests == []
            return
        assert own[0] not in (Code.PERMISSION_DENIED, Code.UNAUTHENTICATED, Code.NOT_FOUND)
        assert foreign == absent
        if rpc == "UnmergeAdapter":  # about what is merged, which the store need not have any more
            assert foreign[0] is Code.FAILED_PRECONDITION
        elif rpc in ABOUT_ONE:
            assert foreign[0] is Code.NOT_FOUND
            assert "NAME" in foreign[1]
        if role is Role.USER and rpc == "Generate":
            assert [request.adapter.name for request in s.engine.requests] == [OWN]


async def test_checks_come_in_the_same_order_for_foreign_and_absent_names(guarded, principals, refusal_of):
    async with guarded() as s:
        stock(s)
        for change in (
            lambda request: request.sampling.MergeFrom(inference_pb2.SamplingParams(top_p=7)),
            lambda request: request.input.Clear(),
            lambda request: setattr(request, "version", 0),
            lambda request: setattr(request, "version", 9),
        ):
            seen = []
            for name in (FOREIGN, ABSENT):
                request = request_for("Generate", name)
                change(request)
                refusal = await refusal_of(call(s.channel, "Generate", request, principals[Role.USER]))
                seen.append((refusal.code, refusal.message.replace(name, "NAME")))
            assert seen[0] == seen[1]


async def test_a_list_holds_what_the_caller_may_use(guarded, principals, keyring):
    everything = keyring.add("root", "admin", "*")
    both = keyring.add("both", "user", "acme/o*", "globex/t?o")
    nothing = keyring.add("nobody", "user")
    async with guarded() as s:
        stock(s)
        s.engine.adapters.add("acmecorp/x")

        async def listed(metadata, **fields):
            found, token = [], ""
            while True:
                request = adapters_pb2.ListAdaptersRequest(page_size=1, page_token=token, **fields)
                reply = await s.admin.ListAdapters(request, metadata=metadata)
                found += [adapter.name for adapter in reply.adapters]
                token = reply.next_page_token
                if not token:
                    return found

        assert await listed(principals[Role.USER]) == [OWN]
        assert await listed(principals[Role.USER], name_prefix="globex") == []
        assert await listed(principals[Role.USER], all_versions=True) == [OWN]
        assert await listed(everything) == [OWN, "acmecorp/x", FOREIGN]
        assert await listed(both) == [OWN, FOREIGN]
        assert await listed(nothing) == []


async def test_an_admin_of_all_sees_all_and_one_of_a_tenant_its_own(guarded, principals, keyring, refusal_of):
    everything = keyring.add("root", "admin", "*")
    async with guarded() as s:
        stock(s)
        request = adapters_pb2.GetAdapterRequest(name=FOREIGN)
        assert (await s.admin.GetAdapter(request, metadata=everything)).adapter.name == FOREIGN
        refusal = await refusal_of(s.admin.GetAdapter(request, metadata=principals[Role.ADMIN]))
        assert refusal.code is Code.NOT_FOUND
        assert refusal.details["ErrorInfo"].metadata["adapter"] == FOREIGN


NAMES = (
    *(
        "..",
        "../etc/passwd",
        "/etc/passwd",
        "acme/../globex",
        "acme/..",
        "acme//one",
        "acme/one/",
        "./acme/one",
    ),
    *("acme%2fone", "acme/%2e%2e", "%2e%2e/one", "acme\\one", "acme/one\x00", "acme/one\n", "acme/one "),
    *(
        "acme/\u2024\u2024",
        "\uff0e\uff0e/one",
        "acme\u2215one",
        "acme\u2044one",
        "\u0430cme/one",
        "acme/one\u202e",
    ),
    *(
        "acme/one@01",
        "acme/one@Stable",
        "acme/one@",
        "acme/one@..",
        "file:///etc/passwd",
        "s3://bucket/x",
        "~/one",
        "acme/$HOME",
        "C:/one",
        "a" * 5000,
    ),
)


@pytest.mark.parametrize("who", ["one_tenant", "everything", "open"])
async def test_what_is_no_name_never_reaches_the_store(serving, keyring, refusal_of, who):
    metadata = keyring.add("root", "admin", "*" if who == "everything" else "acme/*")
    options = {} if who == "open" else {"security": keyring.security()}
    async with serving(**options) as s:
        asked = stock(s)
        for rpc in ("Generate", "Score", "GetAdapter", "LoadAdapter", "UnloadAdapter"):
            for name in NAMES:
                refusal = await refusal_of(call(s.channel, rpc, request_for(rpc, name), metadata))
                assert refusal.code is Code.INVALID_ARGUMENT, ascii(name)
                assert refusal.details["BadRequest"].field_violations[0].field in ("adapter", "name")
                assert len(refusal.message) < 300
        assert asked == []


async def test_a_key_counts_only_as_a_whole(guarded, principals, keyring, refusal_of):
    ((_, value),) = principals[Role.USER]
    key = value.removeprefix("Bearer ")
    async with guarded() as s:
        request = request_for("Tokenize", "")
        for good in (f"Bearer {key}", f"bearer {key}", f"BEARER  {key}"):
            await s.inference.Tokenize(request, metadata=(("authorization", good),))
        for bad in (
            key,
            f"Basic {key}",
            f"Bearer {key[:-1]}",
            f"Bearer {key}x",
            f"Bearer {key}, Bearer {key}",
        ):
            refusal = await refusal_of(s.inference.Tokenize(request, metadata=(("authorization", bad),)))
            assert refusal.code is Code.UNAUTHENTICATED
            assert key[20:] not in refusal.message
        twice = (("authorization", f"Bearer {key}"),) * 2
        assert (await refusal_of(s.inference.Tokenize(request, metadata=twice))).code is Code.UNAUTHENTICATED


async def test_health_stays_open_and_reflection_needs_a_known_caller(guarded, principals):
    async with guarded(reflect=True) as s:
        health = health_pb2_grpc.HealthStub(s.channel)
        reply = await health.Check(health_pb2.HealthCheckRequest(service="hotswap.v1.InferenceService"))
        assert reply.status == health_pb2.HealthCheckResponse.SERVING
        reflection = reflection_pb2_grpc.ServerReflectionStub(s.channel)
        ask = [reflection_pb2.ServerReflectionRequest(list_services="")]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await reflection.ServerReflectionInfo(iter(ask)).read()
        assert caught.value.code() is Code.UNAUTHENTICATED
        known = reflection.ServerReflectionInfo(iter(ask), metadata=principals[Role.USER])
        names = [service.name for service in (await known.read()).list_services_response.service]
        assert "hotswap.v1.AdapterService" in names


async def test_bytes_that_are_no_message_are_an_invalid_request(serving, refusal_of):
    async with serving() as s:
        for rpc, method in METHODS.items():
            make = s.channel.unary_stream if method.server_streaming else s.channel.unary_unary
            made = make(path_of(rpc))(b"\x0a\xff\xff")
            refusal = await refusal_of(made.read() if method.server_streaming else made)
            assert refusal.code is Code.INVALID_ARGUMENT
            assert refusal.details["ErrorInfo"].reason == "INVALID_REQUEST"


async def test_admin_calls_are_audited_however_they_end(guarded, principals, keyring, refusal_of):
    everything = keyring.add("root", "admin", "*")
    async with guarded() as s:
        stock(s)
        with capture_logs() as logs:
            load = adapters_pb2.LoadAdapterRequest(name=OWN)
            await s.admin.LoadAdapter(load, metadata=everything)
            await refusal_of(s.admin.LoadAdapter(load, metadata=principals[Role.USER]))
            await refusal_of(s.admin.LoadAdapter(load))
            foreign = adapters_pb2.LoadAdapterRequest(name=FOREIGN)
            await refusal_of(s.admin.LoadAdapter(foreign, metadata=principals[Role.PUBLISHER]))
            await s.inference.Generate(request_for("Generate", OWN), metadata=everything)
        lines = [
            (line["principal"], line["rpc"], line.get("adapter"), line["result"])
            for line in logs
            if line["event"] == "admin_call"
        ]
        assert lines == [
            ("root", "LoadAdapter", OWN, "OK"),
            ("acme-user", "LoadAdapter", OWN, "PERMISSION_DENIED"),
            (None, "LoadAdapter", None, "UNAUTHENTICATED"),
            ("acme-publisher", "LoadAdapter", FOREIGN, "NOT_FOUND"),
        ]


async def test_logs_hold_neither_content_nor_keys(guarded, principals, refusal_of):
    ((_, value),) = principals[Role.USER]
    async with guarded() as s:
        stock(s)
        with capture_logs() as logs:
            for rpc in ("Generate", "GenerateStream", "Score", "Tokenize"):
                request = request_for(rpc, OWN)
                if rpc == "Score":
                    request.text = "unspeakable"
                else:
                    request.input.prompt = "unspeakable"
                await call(s.channel, rpc, request, principals[Role.USER])
            bad = inference_pb2.GenerateRequest(input=common_pb2.Input(prompt="unspeakable"))
            bad.sampling.stop.extend(["unspeakable"] * 20)
            await refusal_of(s.inference.Generate(bad, metadata=principals[Role.USER]))
        await asyncio.sleep(0.05)
        assert len(logs) >= 4
        assert "unspeakable" not in str(logs)
        assert value[30:] not in str(logs)
        assert "ABC" not in str(logs)


async def test_adapters_on_a_port_of_their_own_are_on_no_other(serving, refusal_of):
    own = {"admin": Address("127.0.0.1", 0), "health_check": Address("127.0.0.1", 0)}
    async with serving(**own) as s:
        stock(s)
        assert len({s.bound.port, s.bound.admin, s.bound.health}) == 3
        generate = ("Generate", request_for("Generate", OWN), None)
        show = ("GetAdapter", request_for("GetAdapter", OWN), None)
        async with (
            grpc.aio.insecure_channel(f"127.0.0.1:{s.bound.admin}") as admin,
            grpc.aio.insecure_channel(f"127.0.0.1:{s.bound.health}") as probed,
        ):
            assert (await call(s.channel, *generate)).text == "ABC"
            assert (await call(admin, *show)).adapter.name == OWN
            for channel, asked in ((s.channel, show), (admin, generate), (probed, show), (probed, generate)):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await call(channel, *asked)
                assert caught.value.code() is Code.UNIMPLEMENTED
            for channel in (s.channel, admin, probed):
                reply = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
                assert reply.status == health_pb2.HealthCheckResponse.SERVING
