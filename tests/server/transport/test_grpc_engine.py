"""The whole server in this process: real engine, store and adapters behind a real channel."""

from __future__ import annotations

import asyncio
import shutil
import urllib.request
from contextlib import asynccontextmanager
from types import SimpleNamespace

import grpc
import pytest
from hotswap.v1 import adapters_pb2, adapters_pb2_grpc, common_pb2, inference_pb2, inference_pb2_grpc
from hotswap_server import app
from support.serving import serving_tiny

NAMES = ("acme/one", "globex/two")


@pytest.fixture(scope="module")
def store(tmp_path_factory, write_lora):
    directory = tmp_path_factory.mktemp("store")
    write_lora(directory / "acme/one/1", seed=1)
    write_lora(
        directory / "globex/two/1", seed=2, r=8, target_modules=["q_proj", "k_proj", "o_proj", "up_proj"]
    )
    write_lora(directory / "acme/broken/1", seed=3)
    weights = directory / "acme/broken/1/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    return directory


@pytest.fixture
def served(tiny_base, store, unused_tcp_port):
    @asynccontextmanager
    async def serve(**flags):
        async with (
            serving_tiny(tiny_base, store, unused_tcp_port, **flags) as server,
            grpc.aio.insecure_channel(server.ready.address) as channel,
        ):
            yield SimpleNamespace(
                ready=server.ready,
                stop=server.stop,
                inference=inference_pb2_grpc.InferenceServiceStub(channel),
                admin=adapters_pb2_grpc.AdapterServiceStub(channel),
            )

    return serve


def generation(prompt="hello", adapter="", **sampling):
    return {
        "adapter": adapter,
        "input": common_pb2.Input(prompt=prompt),
        "sampling": inference_pb2.SamplingParams(**({"temperature": 0.0, "max_new_tokens": 12} | sampling)),
    }


def unary(**fields):
    return inference_pb2.GenerateRequest(**generation(**fields))


async def scrape(s) -> dict[str, float]:
    def get():
        with urllib.request.urlopen(s.ready.metrics_address, timeout=5) as reply:
            return reply.read().decode()

    lines = [line for line in (await asyncio.to_thread(get)).splitlines() if not line.startswith("#")]
    return {series: float(value) for series, _, value in (line.rpartition(" ") for line in lines)}


async def idle(s) -> dict[str, float]:
    """The metrics, once nothing runs and no page is held."""
    for _ in range(200):
        metrics = await scrape(s)
        gauges = ("hotswap_requests_running", "hotswap_requests_waiting", "hotswap_kv_pages_used")
        if not any(metrics[gauge] for gauge in gauges):
            return metrics
        await asyncio.sleep(0.02)
    raise AssertionError(f"still busy: {metrics}")


async def test_adapters_and_base_answer_in_one_batch_as_each_does_alone(served):
    async with served() as s:
        wanted = ["", *NAMES] * 3
        alone = {name: await s.inference.Generate(unary(adapter=name)) for name in wanted[:3]}
        together = await asyncio.gather(*(s.inference.Generate(unary(adapter=name)) for name in wanted))
        assert [reply.token_ids for reply in together] == [alone[name].token_ids for name in wanted]
        assert len({tuple(reply.token_ids) for reply in alone.values()}) == 3
        assert alone["acme/one"].completion.adapter.version == 1
        assert alone["acme/one"].completion.path == common_pb2.SERVING_PATH_BATCHED
        assert alone[""].completion.path == common_pb2.SERVING_PATH_BASE


async def test_a_stream_adds_up_to_the_whole_answer(served):
    async with served() as s:
        whole = await s.inference.Generate(unary(adapter="acme/one", logprobs=2))
        call = s.inference.GenerateStream(
            inference_pb2.GenerateStreamRequest(**generation(adapter="acme/one", logprobs=2))
        )
        messages = [message async for message in call]
        deltas = [message.delta for message in messages[:-1]]
        assert "".join(delta.text for delta in deltas) == whole.text
        assert [token for delta in deltas for token in delta.token_ids] == whole.token_ids
        scores = [entry.logprob for delta in deltas for entry in delta.logprobs]
        assert scores == pytest.approx([entry.logprob for entry in whole.logprobs], abs=1e-5)
        assert messages[-1].completion.finish_reason == whole.completion.finish_reason


async def test_the_score_of_a_greedy_answer_is_its_logprobs(served):
    async with served() as s:
        reply = await s.inference.Generate(unary(adapter="globex/two", logprobs=0))
        score = await s.inference.Score(
            inference_pb2.ScoreRequest(
                adapter="globex/two",
                context=common_pb2.Input(prompt="hello"),
                token_ids=common_pb2.TokenIds(ids=reply.token_ids),
            )
        )
        expected = [entry.logprob for entry in reply.logprobs]
        assert [entry.logprob for entry in score.logprobs] == pytest.approx(expected, abs=1e-4)
        assert score.total_logprob == pytest.approx(sum(expected), abs=1e-3)


async def test_failures_leave_others_alone_and_nothing_behind(served, refusal_of):
    async with served() as s:
        expected = (await s.inference.Generate(unary(adapter="acme/one", max_new_tokens=200))).token_ids
        undisturbed = asyncio.ensure_future(
            s.inference.Generate(unary(adapter="acme/one", max_new_tokens=200))
        )
        stream = s.inference.GenerateStream(
            inference_pb2.GenerateStreamRequest(**generation(adapter="globex/two", max_new_tokens=400))
        )
        await stream.read()
        stream.cancel()
        refusals = {
            "deadline": s.inference.Generate(unary(max_new_tokens=4000, ignore_eos=True), timeout=0.2),
            "missing": s.inference.Generate(unary(adapter="acme/none")),
            "broken": s.inference.Generate(unary(adapter="acme/broken")),
            "long": s.inference.Generate(unary(prompt="x" * 5000)),
        }
        codes = {name: (await refusal_of(call)).code for name, call in refusals.items()}
        assert codes == {
            "deadline": grpc.StatusCode.DEADLINE_EXCEEDED,
            "missing": grpc.StatusCode.NOT_FOUND,
            "broken": grpc.StatusCode.FAILED_PRECONDITION,
            "long": grpc.StatusCode.INVALID_ARGUMENT,
        }
        assert (await undisturbed).token_ids == expected
        await idle(s)
        assert (
            await s.inference.Generate(unary(adapter="acme/one", max_new_tokens=200))
        ).token_ids == expected


async def test_adapters_are_listed_loaded_and_unloaded(served):
    async with served() as s:
        reply = await s.admin.ListAdapters(adapters_pb2.ListAdaptersRequest())
        assert [adapter.name for adapter in reply.adapters] == ["acme/broken", *NAMES]
        loaded = await s.admin.LoadAdapter(adapters_pb2.LoadAdapterRequest(name="acme/one"))
        assert loaded.adapter.residency == adapters_pb2.RESIDENCY_DEVICE
        assert loaded.adapter.num_parameters > 0
        assert loaded.adapter.method_config
        assert (await scrape(s))['hotswap_adapter_slots_used{method="lora"}'] == 1
        left = await s.admin.UnloadAdapter(adapters_pb2.UnloadAdapterRequest(name="acme/one"))
        assert [adapter.residency for adapter in left.adapters] == [adapters_pb2.RESIDENCY_STORE]
        assert (await scrape(s))['hotswap_adapter_slots_used{method="lora"}'] == 0


async def test_unloading_with_cancel_ends_the_requests_that_use_it(served, refusal_of):
    async with served() as s:
        call = s.inference.GenerateStream(
            inference_pb2.GenerateStreamRequest(
                **generation(adapter="acme/one", max_new_tokens=4000, ignore_eos=True)
            )
        )
        await call.read()
        reply = await s.admin.UnloadAdapter(
            adapters_pb2.UnloadAdapterRequest(name="acme/one", in_use=adapters_pb2.IN_USE_POLICY_CANCEL)
        )
        assert reply.cancelled_requests == 1

        async def rest():
            while await call.read() is not grpc.aio.EOF:
                pass

        assert (await refusal_of(rest())).code is grpc.StatusCode.CANCELLED
        await idle(s)


async def test_a_version_published_while_serving_is_used_and_the_old_one_stays(served, store, write_lora):
    async with served() as s:
        first = await s.inference.Generate(unary(adapter="acme/one"))
        try:
            write_lora(store / "acme/one/2", seed=22)
            second = await s.inference.Generate(unary(adapter="acme/one"))
            old = await s.inference.Generate(
                inference_pb2.GenerateRequest(version=1, **generation(adapter="acme/one"))
            )
        finally:
            shutil.rmtree(store / "acme/one/2")
        assert [reply.completion.adapter.version for reply in (first, second, old)] == [1, 2, 1]
        assert first.token_ids == old.token_ids != second.token_ids


async def test_metrics_name_method_path_and_code(served, refusal_of):
    async with served() as s:
        await s.inference.Generate(unary())
        await s.inference.Generate(unary(adapter="acme/one"))
        await refusal_of(s.inference.Generate(unary(adapter="acme/broken")))
        metrics = await idle(s)
        for method in ("base", "lora"):
            assert metrics[f'hotswap_requests_total{{code="OK",method="{method}",rpc="Generate"}}'] == 1
        base, lora = 'method="base",path="base"', 'method="lora",path="batched"'
        for labels in (base, lora):
            assert metrics[f"hotswap_prompt_tokens_total{{{labels}}}"] == 5
            assert 1 <= metrics[f"hotswap_generated_tokens_total{{{labels}}}"] <= 12
            for name in ("time_to_first_token", "queue", "load", "prefill", "decode"):
                assert metrics[f"hotswap_{name}_seconds_count{{{labels}}}"] == 1
        assert metrics['hotswap_adapter_load_seconds_count{method="lora"}'] == 1
        assert metrics['hotswap_adapter_load_failures_total{method="lora",reason="adapter_invalid"}'] == 1
        assert metrics["hotswap_kv_pages"] == s.ready.kv_tokens / 16
        assert metrics['hotswap_adapter_slots{method="lora"}'] == 16


async def test_a_stop_lets_what_runs_finish(served):
    async with served() as s:
        call = s.inference.GenerateStream(
            inference_pb2.GenerateStreamRequest(**generation(max_new_tokens=100, ignore_eos=True))
        )
        await call.read()
        s.stop.set()
        received = 1
        while (message := await call.read()) is not grpc.aio.EOF:
            received += len(message.delta.token_ids)
        assert received == 100


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"base": "/no/such/directory"}, "/no/such/directory"),
        ({"store": "/no/such/store"}, "store"),
        ({"store": "nofs://x/y"}, "--store"),
        ({"kernels": "native", "dtype": "bfloat16"}, "--kernels"),
        ({"kv_cache_bytes": 10}, "--kv-cache-bytes"),
        ({"device": "cuda"}, "--device"),
    ],
)
async def test_what_cannot_be_served_is_said_before_serving(served, flags, named):
    with pytest.raises(app.StartupError, match=named) as caught:
        async with served(**flags):
            pass
    assert "\n" not in str(caught.value)
