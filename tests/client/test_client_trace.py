"""An active OpenTelemetry span goes with every call of both clients; without one nothing does."""

import asyncio
import subprocess
import sys

from hotswap_client import AsyncClient, Client
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider

TRACER = TracerProvider(shutdown_on_exit=False).get_tracer("tests")


def test_the_active_span_is_the_parent_of_each_call(fake):
    async def ask_async() -> None:
        async with AsyncClient(fake.target) as client:
            await client.generate(prompt="x", max_new_tokens=1)
            async for _ in client.stream(prompt="x", max_new_tokens=1):
                pass

    with TRACER.start_as_current_span("caller") as span, Client(fake.target, api_key="k") as client:
        client.generate(prompt="x", max_new_tokens=1)
        list(client.stream(prompt="x", max_new_tokens=1))
        client.adapters.show("acme/support")
        asyncio.run(ask_async())
        context = span.get_span_context()
        expected = f"00-{trace.format_trace_id(context.trace_id)}-{trace.format_span_id(context.span_id)}"
    assert [sent["traceparent"].rpartition("-")[0] for sent in fake.metadata] == [expected] * 5
    assert fake.metadata[0]["authorization"] == "Bearer k"


def test_without_a_span_nothing_is_sent(fake):
    with Client(fake.target) as client:
        client.generate(prompt="x", max_new_tokens=1)
    assert "traceparent" not in fake.metadata[0]


def test_the_client_itself_imports_nothing_of_opentelemetry():
    code = (
        "import sys; from hotswap_client._trace import trace_context; assert trace_context() == (); "
        "print([name for name in sys.modules if 'opentelemetry' in name])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"
