"""Every call of both clients against the scripted server: what is sent, and what comes back."""

import asyncio
import inspect
import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import hotswap_client
import pytest
from hotswap.v1 import adapters_pb2, common_pb2, inference_pb2
from hotswap_client import (
    AsyncClient,
    Client,
    FinishReason,
    InvalidCall,
    MethodCost,
    Residency,
    ServingPath,
    TokenLogprob,
)

LOGPROB = TokenLogprob(7, -0.5, ((8, -0.25),))


def run_sync(target: str, call: Callable[[Any], Any], **options: Any) -> Any:
    with Client(target, **options) as client:
        return call(client)


def run_async(target: str, call: Callable[[Any], Any], **options: Any) -> Any:
    async def run() -> Any:
        async with AsyncClient(target, **options) as client:
            return await call(client)

    return asyncio.run(run())


both = pytest.mark.parametrize("run", [run_sync, run_async])


@both
def test_generate_sends_every_option_and_reads_every_field(fake, run):
    result = run(
        fake.target,
        lambda client: client.generate(
            adapter="acme/support",
            version=3,
            prompt="hello",
            max_new_tokens=4,
            temperature=0.0,
            top_p=0.9,
            top_k=5,
            min_p=0.1,
            repetition_penalty=1.1,
            seed=0,
            stop="END",
            stop_token_ids=[9],
            ignore_eos=True,
            logprobs=1,
        ),
    )
    assert fake.requests == [
        inference_pb2.GenerateRequest(
            adapter="acme/support",
            version=3,
            input=common_pb2.Input(prompt="hello"),
            sampling=inference_pb2.SamplingParams(
                max_new_tokens=4,
                temperature=0.0,
                top_p=0.9,
                top_k=5,
                min_p=0.1,
                repetition_penalty=1.1,
                seed=0,
                stop=["END"],
                stop_token_ids=[9],
                ignore_eos=True,
                logprobs=1,
            ),
        )
    ]
    assert (result.text, result.token_ids, result.logprobs) == ("hi!", (7, 8, 2), (LOGPROB,))
    assert (result.finish_reason, result.path) == (FinishReason.STOP_TOKEN, ServingPath.BATCHED)
    assert (result.adapter, result.version, result.method) == ("acme/support", 3, "lora")
    assert result.digest == "ab" * 32
    assert (result.usage.prompt_tokens, result.usage.generated_tokens) == (5, 3)
    t = result.timings
    assert (t.queue, t.load, t.prefill, t.decode, t.total) == (1, 2, 3, 4, 10)


@both
def test_absent_options_stay_absent(fake, run):
    run(fake.target, lambda client: client.generate(token_ids=[1, 2], temperature=None))
    (request,) = fake.requests
    assert request.input.token_ids.ids == [1, 2]
    assert not request.HasField("version")
    assert request.sampling == inference_pb2.SamplingParams()
    assert not request.sampling.HasField("temperature")


@both
def test_an_answer_of_the_base_has_no_adapter_and_unknown_enums_are_unknown(fake, run):
    fake.scripts["Generate"] = lambda *_: inference_pb2.GenerateResponse(
        completion=inference_pb2.Completion(
            adapter=common_pb2.ResolvedAdapter(method="none"), finish_reason=99, path=99
        )
    )
    result = run(fake.target, lambda client: client.generate(prompt=""))
    assert (result.adapter, result.version, result.digest, result.method) == (None, None, None, "none")
    assert (result.finish_reason, result.path) == (FinishReason.UNKNOWN, ServingPath.UNKNOWN)


@both
def test_score(fake, run):
    result = run(
        fake.target,
        lambda client: client.score(
            adapter="acme/support",
            text="yes",
            context_messages=[{"role": "user", "content": "?"}],
            top_logprobs=1,
        ),
    )
    chat = common_pb2.ChatMessages(messages=[common_pb2.ChatMessage(role="user", content="?")])
    assert fake.requests == [
        inference_pb2.ScoreRequest(
            adapter="acme/support", text="yes", context=common_pb2.Input(messages=chat), top_logprobs=1
        )
    ]
    assert (result.logprobs, result.total_logprob, result.path) == ((LOGPROB,), -0.5, ServingPath.MERGED)
    run(fake.target, lambda client: client.score(token_ids=[4, 5]))
    assert not fake.requests[-1].HasField("context")
    assert fake.requests[-1].token_ids.ids == [4, 5]


@both
def test_tokenize(fake, run):
    turns = [{"role": "user", "content": "hi"}]
    result = run(fake.target, lambda client: client.tokenize(messages=turns, add_generation_prompt=False))
    assert (result.token_ids, result.count) == ((1, 2), 2)
    sent = fake.requests[0].input.messages
    assert sent.messages[0].content == "hi"
    assert sent.HasField("add_generation_prompt")
    assert not sent.add_generation_prompt


@both
def test_list_gathers_all_pages(fake, run):
    found = run(fake.target, lambda client: client.adapters.list(name_prefix="acme/", page_size=1))
    assert [adapter.name for adapter in found] == ["acme/old", "acme/support"]
    assert [request.page_token for request in fake.requests] == ["", "more"]
    adapter = found[1]
    assert (adapter.residency, adapter.pinned, adapter.merged) == (Residency.DEVICE, True, False)
    assert adapter.method_config == {"odd": "not json", "r": 16, "target_modules": ["q_proj"]}
    assert (adapter.size_bytes, adapter.num_parameters, adapter.running_requests) == (3 * 2**20, 1000, 2)


@both
@pytest.mark.parametrize(
    ("verb", "request_type", "seconds"),
    [
        ("show", adapters_pb2.GetAdapterRequest, None),
        ("load", adapters_pb2.LoadAdapterRequest, 0.25),
        ("pin", adapters_pb2.PinAdapterRequest, None),
        ("merge", adapters_pb2.MergeAdapterRequest, 0.5),
        ("unmerge", adapters_pb2.UnmergeAdapterRequest, 0.75),
    ],
)
def test_admin_calls(fake, run, verb, request_type, seconds):
    result = run(fake.target, lambda client: getattr(client.adapters, verb)("acme/support", version=3))
    assert fake.requests == [request_type(name="acme/support", version=3)]
    assert (result if seconds is None else result.adapter).name == "acme/support"
    assert seconds is None or result.seconds == seconds


@both
def test_methods_are_measured(fake, run):
    base, lora = run(fake.target, lambda client: client.adapters.calibrate(only_resident=True))
    assert fake.requests == [adapters_pb2.CalibrateMethodsRequest(only_resident=True)]
    assert (base.method, base.path, base.overhead_ratio) == ("none", ServingPath.BASE, 1)
    assert lora == MethodCost("lora", ServingPath.BATCHED, 8, 1.25, 0.0125, 4, True)


@both
def test_load_to_host_memory(fake, run):
    run(fake.target, lambda client: client.adapters.load("acme/support", to="host"))
    assert fake.requests[-1].residency == adapters_pb2.RESIDENCY_HOST
    with pytest.raises(InvalidCall, match="must be device or host, got 'store'"):
        run(fake.target, lambda client: client.adapters.load("acme/support", to="store"))


@both
def test_unload_and_unpin(fake, run):
    result = run(fake.target, lambda client: client.adapters.unload("acme/support", in_use="cancel"))
    assert fake.requests[-1].in_use == adapters_pb2.IN_USE_POLICY_CANCEL
    assert (result.cancelled_requests, len(result.adapters)) == (2, 1)
    assert len(run(fake.target, lambda client: client.adapters.unpin("acme/support"))) == 1
    with pytest.raises(InvalidCall, match="refuse, wait, cancel"):
        run(fake.target, lambda client: client.adapters.unload("acme/support", in_use="kill"))


@both
def test_metadata_carries_the_adapter_and_the_key(fake, run):
    run(fake.target, lambda client: client.generate(adapter="acme/suppört", prompt="x"), api_key="s3cret")
    run(fake.target, lambda client: client.adapters.show("acme/support"), api_key="s3cret")
    run(fake.target, lambda client: client.tokenize(prompt="x"))
    assert [sent.get("x-adapter") for sent in fake.metadata] == ["acme/supp%C3%B6rt", "acme/support", None]
    assert [sent.get("authorization") for sent in fake.metadata] == ["Bearer s3cret", "Bearer s3cret", None]


@both
@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({}, "input"),
        ({"prompt": "x", "messages": [{"role": "user", "content": "x"}]}, "input"),
        ({"prompt": "x", "token_ids": [1]}, "input"),
        ({"prompt": 3}, "input.prompt"),
        ({"messages": [{"role": "user", "text": "x"}]}, "input.messages"),
        ({"prompt": "x", "top_k": 2**40}, "sampling.top_k"),
        ({"prompt": "x", "temperature": "hot"}, "sampling.temperature"),
        ({"prompt": "x", "stop_token_ids": [2**40]}, "sampling.stop_token_ids"),
    ],
)
def test_arguments_that_make_no_request_are_refused_before_a_call(fake, run, options, field):
    with pytest.raises(InvalidCall) as caught:
        run(fake.target, lambda client: client.generate(**options))
    assert caught.value.field == field
    assert isinstance(caught.value, TypeError)
    assert fake.requests == []


@both
def test_an_unknown_option_is_a_type_error(fake, run):
    with pytest.raises(TypeError, match="max_tokens"):
        run(fake.target, lambda client: client.generate(prompt="x", max_tokens=3))


@pytest.mark.parametrize("kind", [Client, AsyncClient])
async def test_repr_masks_the_key(kind):
    client = kind("localhost:1", api_key="s3cret")
    assert "s3cret" not in repr(client)
    assert "s3cret" not in repr(client._settings)
    assert "***" in repr(client)
    closing = client.close()
    if inspect.isawaitable(closing):
        await closing


def test_settings_are_checked():
    with pytest.raises(ValueError, match="ASCII") as caught:
        Client(api_key="s3cret\n")
    assert "s3cret" not in str(caught.value)
    with pytest.raises(ValueError, match="between 0 and 4"):
        Client(retries=9)
    with pytest.raises(ValueError, match="cert and key"):
        hotswap_client.TLS(cert="x")


def test_both_clients_have_the_same_shape():
    def shape(kind) -> dict[str, list[str]]:
        public = {name: value for name, value in vars(kind).items() if not name.startswith("_")}
        return {name: list(inspect.signature(value).parameters) for name, value in public.items()}

    assert shape(Client) == shape(AsyncClient)
    assert shape(hotswap_client.Adapters) == shape(hotswap_client.AsyncAdapters)


def test_importing_the_client_brings_nothing_heavy():
    code = "import sys, json, hotswap_client; print(json.dumps(sorted(sys.modules)))"
    loaded = json.loads(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout)
    top = {name.partition(".")[0] for name in loaded}
    assert not top & {"torch", "typer", "rich", "numpy", "transformers", "hotswap_server", "hotswap_trainer"}
