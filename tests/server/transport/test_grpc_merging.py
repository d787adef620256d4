"""Merging from outside: the whole server, asked by the client."""

import asyncio
import urllib.request
from contextlib import asynccontextmanager
from types import SimpleNamespace

import pytest
from hotswap_client import AsyncClient, FailedPrecondition, Residency, ServingPath
from support.serving import serving_tiny


@pytest.fixture(scope="module")
def store(tmp_path_factory, write_lora):
    directory = tmp_path_factory.mktemp("store")
    write_lora(directory / "acme/hot/1", seed=1)
    write_lora(directory / "acme/other/1", seed=2)
    return directory


@pytest.fixture
def served(tiny_base, store, unused_tcp_port):
    @asynccontextmanager
    async def serve(**flags):
        async with (
            serving_tiny(tiny_base, store, unused_tcp_port, **flags) as server,
            AsyncClient(server.ready.address) as client,
        ):
            yield SimpleNamespace(client=client, metrics=server.ready.metrics_address)

    return serve


async def ask(client, adapter=None):
    return await client.generate(adapter=adapter, prompt="hello", max_new_tokens=12, temperature=0.0)


async def scrape(address, prefix):
    def get():
        with urllib.request.urlopen(address, timeout=5) as reply:
            return reply.read().decode()

    lines = (line for line in (await asyncio.to_thread(get)).splitlines() if line.startswith(prefix))
    return {series: float(value) for series, _, value in (line.rpartition(" ") for line in lines)}


async def test_a_merge_and_back_seen_by_a_client(served):
    async with served() as s:
        names = [None, "acme/hot", "acme/other"]
        before = [await ask(s.client, name) for name in names]
        assert [answer.path for answer in before] == [
            ServingPath.BASE,
            ServingPath.BATCHED,
            ServingPath.BATCHED,
        ]

        merged = await s.client.adapters.merge("acme/hot")
        assert (merged.adapter.merged, merged.adapter.residency) == (True, Residency.DEVICE)
        assert merged.seconds > 0
        assert (await s.client.adapters.merge("acme/hot", version=1)).seconds == 0
        listed = {adapter.name: adapter.merged for adapter in await s.client.adapters.list()}
        assert listed == {"acme/hot": True, "acme/other": False}
        during = await asyncio.gather(*(ask(s.client, name) for name in names))
        assert [answer.path for answer in during] == [
            ServingPath.BASE,
            ServingPath.MERGED,
            ServingPath.BATCHED,
        ]
        assert [answer.token_ids for answer in during] == [answer.token_ids for answer in before]
        with pytest.raises(FailedPrecondition, match="is merged; unmerge it first"):
            await s.client.adapters.unload("acme/hot")
        with pytest.raises(FailedPrecondition, match=r"acme/other is not merged$") as refused:
            await s.client.adapters.unmerge("acme/other")
        assert refused.value.reason == "MERGE_REFUSED"

        assert not (await s.client.adapters.unmerge("acme/hot")).adapter.merged
        after = [await ask(s.client, name) for name in names]
        assert [(a.path, a.token_ids) for a in after] == [(a.path, a.token_ids) for a in before]
        await s.client.adapters.unload("acme/hot")

        seen = await scrape(s.metrics, "hotswap_adapter")
        assert seen["hotswap_adapter_merges_total"] == seen["hotswap_adapter_unmerges_total"] == 1
        assert seen["hotswap_adapter_merge_seconds_count"] == 1
        assert seen["hotswap_adapters_merged"] == 0
        path = 'hotswap_generated_tokens_total{method="lora",path="merged"}'
        assert (await scrape(s.metrics, path)) == {path: 12.0}


async def test_a_server_may_merge_nothing(served):
    async with served(merge_policy="off") as s:
        with pytest.raises(FailedPrecondition, match="--merge-policy manual or auto"):
            await s.client.adapters.merge("acme/hot")


async def test_the_traffic_itself_merges_and_unmerges(served):
    async with served(merge_policy="auto", merge_window="0.5") as s:

        async def until(path, adapter, judged):
            async with asyncio.timeout(60):
                while (await ask(s.client, adapter)).path is not path:
                    assert (await s.client.adapters.show(judged)).error == ""

        await until(ServingPath.MERGED, "acme/hot", "acme/hot")
        async with asyncio.timeout(60):
            while (await s.client.adapters.show("acme/hot")).merged:
                await ask(s.client)
        assert (await ask(s.client, "acme/hot")).path is ServingPath.BATCHED


async def test_an_administrator_has_the_methods_measured_and_metrics_show_it(served):
    async with served() as s:
        assert await scrape(s.metrics, "hotswap_method_overhead_ratio{") == {}
        await ask(s.client, "acme/hot")
        costs = await s.client.adapters.calibrate(only_resident=True)
        assert {(cost.method, cost.path) for cost in costs} == {
            ("none", ServingPath.BASE),
            ("lora", ServingPath.BATCHED),
        }
        shown = await scrape(s.metrics, "hotswap_method_overhead_ratio{")
        [cost] = [cost for cost in costs if cost.method == "lora" and cost.batch_size == 1]
        series = 'hotswap_method_overhead_ratio{batch="1",method="lora",path="batched"}'
        assert shown[series] == pytest.approx(cost.overhead_ratio)


async def test_a_server_can_measure_before_it_is_ready(served):
    async with served(calibrate=True, calibrate_interval=0) as s:
        shown = await scrape(s.metrics, "hotswap_method_overhead_ratio{")
        methods = {series.partition('method="')[2].partition('"')[0] for series in shown}
        assert methods == {"base", "lora", "bottleneck", "prefix", "ia3"}
        sources = await scrape(s.metrics, "hotswap_method_calibration_adapters{")
        assert all("made_up" in series for series in sources if 'method="base"' not in series)
