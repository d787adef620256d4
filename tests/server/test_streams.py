"""Very many streams at once on a tiny base: none is lost, and none gets ahead or is left behind."""

import asyncio
import itertools
import threading
from functools import partial

import pytest
from hotswap_client import AsyncClient
from hotswap_server import app
from hotswap_server.config import load_settings
from hotswap_server.engine.engine import Engine
from hotswap_server.engine.runner import ModelRunner
from support.models import random_prompt
from support.running import SOON_S, Running
from support.serving import serving

PROMPTS = [random_prompt(1 + n, seed=n) for n in range(8)]
BATCH = 64
MAX_LEAD = 8  # tokens: a step gives everybody one, and some of them are on their way
SIZES = [(200, 16), pytest.param(1000, 48, marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def alone(llama_base, tokenizer, tmp_path_factory):
    with Running(llama_base, tokenizer, tmp_path_factory.mktemp("store")) as running:
        return [running.generate(prompt, max_new_tokens=48).result().tokens for prompt in PROMPTS]


@pytest.fixture
def opened(monkeypatch):
    """Set when all streams are there; no step begins before."""
    opened = threading.Event()
    run = ModelRunner.run

    def held(runner, inputs):
        assert opened.wait(SOON_S)
        return run(runner, inputs)

    monkeypatch.setattr(ModelRunner, "run", held)
    yield opened
    opened.set()


def sampled(loaded: app.Loaded, name: str) -> float:
    return loaded.metrics.registry.get_sample_value(name) or 0.0


@pytest.fixture
def turns(monkeypatch):
    """Requests in the order of their first tokens, numbered in the order in which they came to the engine."""
    turns: dict[int, None] = {}
    numbers = itertools.count()
    submit = Engine.submit

    def noted(engine, request, sink, **options):
        number = next(numbers)

        def note(event):
            turns.setdefault(number)
            return sink(event)

        return submit(engine, request, note, **options)

    monkeypatch.setattr(Engine, "submit", noted)
    return turns


class Arrivals:
    """Which stream every token came to, in the order in which they came."""

    def __init__(self) -> None:
        self.order: list[int] = []

    def lead(self, num_streams: int) -> int:
        """The most tokens by which one stream was ever ahead of the last of all."""
        counts, lead = [0] * num_streams, 0
        at = [num_streams]  # how many streams have so many tokens
        lowest = 0
        for stream in self.order:
            at[counts[stream]] -= 1
            counts[stream] += 1
            if counts[stream] == len(at):
                at.append(0)
            at[counts[stream]] += 1
            while not at[lowest]:
                lowest += 1
            lead = max(lead, counts[stream] - lowest)
        return lead


async def hold(loaded, opened, num_streams, num_tokens) -> tuple[Arrivals, list[list[int]]]:
    """Open all streams, let the engine go once it has them all, and read them to their ends."""
    arrivals = Arrivals()
    received: list[list[int]] = [[] for _ in range(num_streams)]

    async def read(index: int) -> None:
        stream = client.stream(
            token_ids=PROMPTS[index % len(PROMPTS)],
            temperature=0.0,
            max_new_tokens=num_tokens,
            ignore_eos=True,
        )
        async for delta in stream:
            received[index] += delta.token_ids
            arrivals.order += [index] * len(delta.token_ids)
        assert stream.result is not None

    async with (
        serving(partial(app.run, loaded)) as server,
        AsyncClient(server.ready.address, retries=0) as client,
        asyncio.TaskGroup() as readers,
    ):
        for index in range(num_streams):
            readers.create_task(read(index))
        async with asyncio.timeout(SOON_S):
            while (
                sampled(loaded, "hotswap_requests_running") + sampled(loaded, "hotswap_requests_waiting")
                < num_streams
            ):
                await asyncio.sleep(0.02)
        opened.set()
    assert sampled(loaded, "hotswap_kv_pages_used") == 0
    return arrivals, received


def wrong(received: list[list[int]], alone: list[list[int]], num_tokens: int) -> list[int]:
    """The streams that did not end with the answer that their prompt gets alone."""
    return [
        stream
        for stream, tokens in enumerate(received)
        if tokens != alone[stream % len(PROMPTS)][:num_tokens]
    ]


def serve(base, store, **options) -> app.Loaded:
    flags = {"base": str(base), "store": str(store), "threads": 1, "port": 0, "metrics_port": 0}
    return app.load(load_settings(**(flags | {"kv_cache_bytes": "256MiB"} | options)))


@pytest.mark.parametrize(("num_streams", "num_tokens"), SIZES)
def test_streams_that_run_together_go_on_together(
    llama_directory, alone, opened, tmp_path, num_streams, num_tokens
):
    loaded = serve(llama_directory, tmp_path, max_batch_size=num_streams, max_batch_tokens=8 * num_streams)
    arrivals, received = asyncio.run(hold(loaded, opened, num_streams, num_tokens))
    assert wrong(received, alone, num_tokens) == []
    assert arrivals.lead(num_streams) <= MAX_LEAD


@pytest.mark.parametrize(("num_streams", "num_tokens"), SIZES)
def test_streams_that_wait_begin_in_their_turn(
    llama_directory, alone, opened, turns, tmp_path, num_streams, num_tokens
):
    loaded = serve(llama_directory, tmp_path, max_batch_size=BATCH)
    _, received = asyncio.run(hold(loaded, opened, num_streams, num_tokens))
    assert len(turns) == num_streams
    late = [abs(place - number) for place, number in enumerate(turns)]
    assert wrong(received, alone, num_tokens) == []
    assert max(late) <= BATCH
