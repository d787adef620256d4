"""Spans of a real server's calls: whose children they are, when they were, and what they say."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import urllib.request
from contextlib import asynccontextmanager
from types import SimpleNamespace

import grpc
import pytest
from hotswap.v1 import adapters_pb2, adapters_pb2_grpc, common_pb2, inference_pb2, inference_pb2_grpc
from hotswap_server import app
from hotswap_server.tracing import Tracing, TracingSettingsError, check_tracing
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from support.serving import serving_tiny

GENERATE = "hotswap.v1.InferenceService/Generate"
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAMPLED = (("traceparent", f"00-{TRACE}-{PARENT}-01"),)
PROMPT = "a secret of the caller"


@pytest.fixture(scope="module")
def store(tmp_path_factory, write_lora):
    directory = tmp_path_factory.mktemp("store")
    write_lora(directory / "acme/one/1", seed=1)
    return directory


@pytest.fixture(autouse=True)
def _no_standard_variables(monkeypatch):
    for name in ("ENDPOINT", "TRACES_ENDPOINT", "PROTOCOL", "TRACES_PROTOCOL"):
        monkeypatch.delenv(f"OTEL_EXPORTER_OTLP_{name}", raising=False)


@pytest.fixture
def exporter(monkeypatch):
    """Spans of servers that name a collector end here."""
    exporter = InMemorySpanExporter()

    def opened(endpoint, *, version):
        provider = TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(exporter))
        return Tracing(provider)

    monkeypatch.setattr(app, "open_tracing", opened)
    return exporter


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
                inference=inference_pb2_grpc.InferenceServiceStub(channel),
                admin=adapters_pb2_grpc.AdapterServiceStub(channel),
            )

    return serve


def unary(adapter="", **sampling):
    return inference_pb2.GenerateRequest(
        adapter=adapter,
        input=common_pb2.Input(prompt=PROMPT),
        sampling=inference_pb2.SamplingParams(
            **({"temperature": 0.0, "max_new_tokens": 6, "ignore_eos": True} | sampling)
        ),
    )


def by_name(spans):
    return {span.name: span for span in spans}


async def failed(call) -> grpc.StatusCode:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code()


async def test_a_call_is_a_span_under_the_callers_with_its_stages_inside(served, exporter):
    async with served(otlp_endpoint="http://127.0.0.1:4317") as s:
        reply = await s.inference.Generate(unary("acme/one"), metadata=SAMPLED)
    spans = by_name(exporter.get_finished_spans())
    call = spans.pop(GENERATE)
    assert call.kind is SpanKind.SERVER
    assert format(call.context.trace_id, "032x") == TRACE
    assert format(call.parent.span_id, "016x") == PARENT
    assert call.status.status_code is StatusCode.UNSET
    attributes = dict(call.attributes)
    assert attributes.pop("hotswap.request_id")
    assert attributes == {
        "rpc.system.name": "grpc",
        "rpc.method": GENERATE,
        "rpc.response.status_code": "OK",
        "hotswap.adapter": "acme/one",
        "hotswap.version": 1,
        "hotswap.digest": reply.completion.adapter.digest,
        "hotswap.method": "lora",
        "hotswap.path": "batched",
        "hotswap.prompt_tokens": reply.completion.usage.prompt_tokens,
        "hotswap.generated_tokens": 6,
        "hotswap.finish_reason": "length",
    }
    assert set(spans) == {"queue", "load", "prefill", "decode"}
    stages = [spans[name] for name in ("queue", "load", "prefill", "decode")]
    assert all(stage.parent.span_id == call.context.span_id for stage in stages)
    times = [call.start_time, *(t for stage in stages for t in (stage.start_time, stage.end_time))]
    times.append(call.end_time)
    assert times == sorted(times)
    timings = reply.completion.timings
    for stage in stages:
        told = getattr(timings, f"{stage.name}_seconds")
        assert (stage.end_time - stage.start_time) / 1e9 == pytest.approx(told, abs=1e-6)
    everything = "".join(span.to_json() for span in exporter.get_finished_spans())
    assert PROMPT not in everything
    assert reply.text not in everything or not reply.text.strip()


async def test_calls_that_fail_have_spans_that_say_so(served, exporter):
    async with served(otlp_endpoint="http://127.0.0.1:4317") as s:
        absent = s.inference.Generate(unary("acme/absent"))
        assert await failed(absent) is grpc.StatusCode.NOT_FOUND
        late = s.inference.Generate(unary(max_new_tokens=3000), timeout=0.3)
        assert await failed(late) is grpc.StatusCode.DEADLINE_EXCEEDED
        left = s.inference.GenerateStream(
            inference_pb2.GenerateStreamRequest(
                input=common_pb2.Input(prompt=PROMPT),
                sampling=inference_pb2.SamplingParams(max_new_tokens=3000, ignore_eos=True),
            )
        )
        await left.read()
        left.cancel()
        await s.admin.LoadAdapter(adapters_pb2.LoadAdapterRequest(name="acme/one"))
    calls = {span.attributes["rpc.response.status_code"]: span for span in calls_of(exporter)}
    assert set(calls) == {"NOT_FOUND", "DEADLINE_EXCEEDED", "CANCELLED", "OK"}
    assert calls["NOT_FOUND"].status.description == "ADAPTER_NOT_FOUND"
    assert calls["NOT_FOUND"].attributes["hotswap.adapter"] == "acme/absent"
    assert all(
        (span.status.status_code is StatusCode.ERROR) == (code != "OK") for code, span in calls.items()
    )
    assert calls["OK"].attributes["hotswap.adapter"] == "acme/one"
    assert all(span.parent is None for span in calls.values()), "nobody traced them before"
    ids = calls["CANCELLED"].context
    stages = [s for s in exporter.get_finished_spans() if s.parent and s.parent.span_id == ids.span_id]
    assert [s.status.status_code for s in stages if s.name == "decode"] == [StatusCode.ERROR]
    assert {s.status.description for s in stages if s.status.description} == {"CANCELLED"}


def calls_of(exporter):
    return [span for span in exporter.get_finished_spans() if span.kind is SpanKind.SERVER]


async def test_the_callers_sampling_holds_and_exemplars_name_traces(served, exporter):
    async with served(otlp_endpoint="http://127.0.0.1:4317") as s:
        await s.inference.Generate(unary(), metadata=(("traceparent", f"00-{TRACE}-{PARENT}-00"),))
        assert not exporter.get_finished_spans()
        assert "trace_id" not in await scraped(s, openmetrics=True)
        await s.inference.Generate(unary(), metadata=SAMPLED)
        page = await scraped(s, openmetrics=True)
        await s.inference.Generate(unary(), metadata=(("traceparent", "00-not-a-trace"),))
        plain = await scraped(s, openmetrics=False)
    assert len({span.context.trace_id for span in calls_of(exporter)}) == 2
    names = ("request", "time_to_first_token", "inter_token", "end_to_end", "queue", "prefill", "decode")
    for name in names:
        lines = [line for line in page.splitlines() if line.startswith(f"hotswap_{name}_seconds_bucket")]
        assert any(f'# {{trace_id="{TRACE}"}}' in line for line in lines), name
    assert "trace_id" not in plain


async def scraped(s, *, openmetrics: bool) -> str:
    request = urllib.request.Request(s.ready.metrics_address)
    if openmetrics:
        request.add_header("Accept", "application/openmetrics-text; version=1.0.0")

    def get():
        with urllib.request.urlopen(request, timeout=10) as reply:
            return reply.read().decode()

    return await asyncio.to_thread(get)


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    def __init__(self) -> None:
        self.spans: list = []
        self.services: set[str] = set()

    async def Export(self, request, context):
        for resource in request.resource_spans:
            attributes = {a.key: a.value.string_value for a in resource.resource.attributes}
            self.services.add(attributes["service.name"])
            self.spans += [span for scope in resource.scope_spans for span in scope.spans]
        return trace_service_pb2.ExportTraceServiceResponse()


async def test_a_collector_gets_every_span_when_the_server_stops(served, monkeypatch):
    collector, server = Collector(), grpc.aio.server()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{port}")
    try:
        async with served() as s:
            await s.inference.Generate(unary(), metadata=SAMPLED)
    finally:
        await server.stop(None)
    assert {span.name for span in collector.spans} == {GENERATE, "queue", "prefill", "decode"}
    assert {span.trace_id.hex() for span in collector.spans} == {TRACE}
    assert collector.services == {"hotswap"}


async def test_a_collector_that_is_not_there_harms_nothing(served, monkeypatch, unused_tcp_port_factory):
    monkeypatch.setattr(app, "_FLUSH_S", 0.2)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    async with served(otlp_endpoint=f"http://127.0.0.1:{unused_tcp_port_factory()}") as s:
        replies = await asyncio.gather(*(s.inference.Generate(unary()) for _ in range(4)))
        assert all(reply.completion.usage.generated_tokens == 6 for reply in replies)


async def test_no_collector_no_spans(served, exporter):
    async with served() as s:
        await s.inference.Generate(unary(), metadata=SAMPLED)
        assert "trace_id" not in await scraped(s, openmetrics=True)
    assert not exporter.get_finished_spans()


@pytest.fixture
def without_extra(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "opentelemetry"]:
        monkeypatch.setitem(sys.modules, name, None)


async def test_a_server_that_is_not_asked_needs_nothing_of_opentelemetry(served, without_extra):
    async with served() as s:
        reply = await s.inference.Generate(unary(), metadata=SAMPLED)
    assert reply.completion.usage.generated_tokens == 6


def test_a_missing_extra_is_named(without_extra):
    with pytest.raises(
        TracingSettingsError, match=r"the extra otel .* pip install 'hotswap\[otel\]'"
    ) as caught:
        check_tracing("http://localhost:4317")
    assert caught.value.name == "--otlp-endpoint"


@pytest.mark.slow  # for a process that imports torch
def test_importing_the_server_imports_nothing_of_opentelemetry():
    code = "import sys, hotswap_server.grpc.server; print([n for n in sys.modules if 'opentelemetry' in n])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("endpoint", ["localhost:4317", "ftp://host:4317", "http://", "http://host:port", ""])
def test_an_endpoint_that_is_no_url_is_refused_by_name(endpoint):
    with pytest.raises(TracingSettingsError, match="must be http://HOST:PORT") as caught:
        check_tracing(endpoint)
    assert caught.value.name == "--otlp-endpoint"


def test_standard_variables(monkeypatch):
    assert check_tracing(None) is None
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://one:4317")
    assert check_tracing(None) == "http://one:4317"
    assert check_tracing("https://two:4317") == "https://two:4317"
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf")
    with pytest.raises(TracingSettingsError, match="by grpc alone") as caught:
        check_tracing(None)
    assert caught.value.name == "OTEL_EXPORTER_OTLP_PROTOCOL"
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    assert check_tracing(None) is None


async def test_a_server_that_cannot_trace_does_not_start(served):
    with pytest.raises(app.StartupError, match="--otlp-endpoint: must be"):
        async with served(otlp_endpoint="collector"):
            pass
