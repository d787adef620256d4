"""AdapterService over a scripted manager."""

from __future__ import annotations

import grpc
import pytest
from hotswap.v1 import adapters_pb2
from hotswap_server.adapters.residency import InUse, Residency
from hotswap_server.errors import CapacityError


async def listed(s, **fields) -> list[tuple[str, int]]:
    reply = await s.admin.ListAdapters(adapters_pb2.ListAdaptersRequest(**fields))
    return [(adapter.name, adapter.version) for adapter in reply.adapters]


async def test_a_list_has_the_newest_and_what_is_in_memory(serving):
    async with serving() as s:
        for version in (3, 1, 2):
            s.engine.adapters.add("b/x", version)
        s.engine.adapters.add("b/x", 1, residency=Residency.HOST)
        s.engine.adapters.add("a/y", 10)
        assert await listed(s) == [("a/y", 10), ("b/x", 1), ("b/x", 3)]
        every = [("a/y", 10), ("b/x", 1), ("b/x", 2), ("b/x", 3)]
        assert await listed(s, all_versions=True) == every
        assert await listed(s, name_prefix="a/") == [("a/y", 10)]


async def test_pages_hold_every_adapter_once(serving):
    async with serving() as s:
        for version in range(1, 12):
            s.engine.adapters.add("a/x", version)
        found, token, pages = [], "", 0
        while pages == 0 or token:
            reply = await s.admin.ListAdapters(
                adapters_pb2.ListAdaptersRequest(page_size=4, page_token=token, all_versions=True)
            )
            found += [adapter.version for adapter in reply.adapters]
            token, pages = reply.next_page_token, pages + 1
        assert found == list(range(1, 12))
        assert pages == 3
        assert len(s.engine.adapters.listed) == 11, "what is on another page is not read"


async def test_an_adapter_is_described(serving):
    async with serving() as s:
        info = s.engine.adapters.add("a/x", 2, residency=Residency.DEVICE, running=4)
        reply = await s.admin.GetAdapter(adapters_pb2.GetAdapterRequest(name="a/x"))
        assert reply.adapter == adapters_pb2.Adapter(
            name="a/x",
            version=2,
            digest=info.ref.digest,
            method="lora",
            size_bytes=1000,
            num_parameters=50,
            method_config={"r": "8"},
            residency=adapters_pb2.RESIDENCY_DEVICE,
            running_requests=4,
        )


async def test_load_brings_it_to_the_device_once(serving):
    async with serving() as s:
        s.engine.adapters.add("a/x")
        request = adapters_pb2.LoadAdapterRequest(name="a/x")
        first = await s.admin.LoadAdapter(request)
        assert first.adapter.residency == adapters_pb2.RESIDENCY_DEVICE
        assert first.load_seconds > 0
        assert (await s.admin.LoadAdapter(request)).load_seconds == 0


async def test_load_reports_why_not(serving, refusal_of):
    async with serving() as s:
        s.engine.adapters.errors["a/x"] = CapacityError("all slots are in use")
        refusal = await refusal_of(s.admin.LoadAdapter(adapters_pb2.LoadAdapterRequest(name="a/x")))
        assert refusal.code is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_load_to_host_memory(serving, refusal_of):
    async with serving() as s:
        s.engine.adapters.add("a/x")
        request = adapters_pb2.LoadAdapterRequest(name="a/x", residency=adapters_pb2.RESIDENCY_HOST)
        first = await s.admin.LoadAdapter(request)
        assert first.adapter.residency == adapters_pb2.RESIDENCY_HOST
        assert first.load_seconds > 0
        assert (await s.admin.LoadAdapter(request)).load_seconds == 0
        request.residency = adapters_pb2.RESIDENCY_STORE
        refusal = await refusal_of(s.admin.LoadAdapter(request))
        assert refusal.details["BadRequest"].field_violations[0].field == "residency"


async def test_pin_and_unpin(serving, refusal_of):
    async with serving() as s:
        s.engine.adapters.add("a/x", 1)
        s.engine.adapters.add("a/x", 2)
        for version in (1, 2):
            pinned = await s.admin.PinAdapter(adapters_pb2.PinAdapterRequest(name="a/x", version=version))
            assert (pinned.adapter.version, pinned.adapter.pinned) == (version, True)
        reply = await s.admin.UnpinAdapter(adapters_pb2.UnpinAdapterRequest(name="a/x"))
        assert [(adapter.version, adapter.pinned) for adapter in reply.adapters] == [(1, False), (2, False)]
        again = await s.admin.UnpinAdapter(adapters_pb2.UnpinAdapterRequest(name="a/x"))
        assert list(again.adapters) == []
        for verb in ("Pin", "Unpin"):
            message = getattr(adapters_pb2, f"{verb}AdapterRequest")(name="a/z")
            refusal = await refusal_of(getattr(s.admin, f"{verb}Adapter")(message))
            assert refusal.code is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize(
    "policy", [adapters_pb2.IN_USE_POLICY_UNSPECIFIED, adapters_pb2.IN_USE_POLICY_REFUSE]
)
async def test_unload_refuses_by_default_while_requests_run(serving, refusal_of, policy):
    async with serving() as s:
        s.engine.adapters.add("a/x", residency=Residency.DEVICE, running=2)
        request = adapters_pb2.UnloadAdapterRequest(name="a/x", in_use=policy)
        refusal = await refusal_of(s.admin.UnloadAdapter(request))
        assert refusal.code is grpc.StatusCode.FAILED_PRECONDITION
        assert refusal.details["ErrorInfo"].reason == "ADAPTER_IN_USE"
        assert s.engine.adapters.unloaded == []


@pytest.mark.parametrize(
    ("policy", "cancelled"), [(adapters_pb2.IN_USE_POLICY_WAIT, 0), (adapters_pb2.IN_USE_POLICY_CANCEL, 2)]
)
async def test_unload_tells_what_left_and_who_was_cancelled(serving, policy, cancelled):
    async with serving() as s:
        s.engine.adapters.add("a/x", 1)
        s.engine.adapters.add("a/x", 2, residency=Residency.DEVICE, running=2)
        reply = await s.admin.UnloadAdapter(adapters_pb2.UnloadAdapterRequest(name="a/x", in_use=policy))
        assert [(a.version, a.residency) for a in reply.adapters] == [(2, adapters_pb2.RESIDENCY_STORE)]
        assert reply.cancelled_requests == cancelled
        assert s.engine.adapters.unloaded == [("a/x", None, InUse.CANCEL if cancelled else InUse.WAIT)]


async def test_unloading_what_is_not_in_memory_is_no_error_but_an_unknown_name_is(serving, refusal_of):
    async with serving() as s:
        s.engine.adapters.add("a/x")
        reply = await s.admin.UnloadAdapter(adapters_pb2.UnloadAdapterRequest(name="a/x"))
        assert list(reply.adapters) == []
        refusal = await refusal_of(s.admin.UnloadAdapter(adapters_pb2.UnloadAdapterRequest(name="a/z")))
        assert refusal.code is grpc.StatusCode.NOT_FOUND
