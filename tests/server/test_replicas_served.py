"""Three real servers over one store of 60 adapters: affinity, a replica that dies, and a rolling restart."""

from __future__ import annotations

import asyncio
import functools
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hotswap_client import AsyncClient, Client, HotswapError, Residency, Stream, Unavailable
from support.adapters import Oracle, edit_tensors
from support.replicas import Replica, replicas
from support.running import wait_until
from transformers import AutoModelForCausalLM

NAMES = [f"tenant-{number % 6}/adapter-{number}" for number in range(60)]
PROMPT = (5, 6, 7, 8)
NUM_TOKENS = 6
# The small form is of threads and half of the adapters.
KINDS = ["threads", pytest.param("processes", marks=pytest.mark.slow)]
LONG = 3000  # tokens; seconds, even of the tiny base


@pytest.fixture(scope="module")
def store(tmp_path_factory, write_lora) -> Path:
    root = tmp_path_factory.mktemp("replicas") / "store"
    [first, *others] = NAMES
    write_lora(root / first)
    for seed, name in enumerate(others):
        shutil.copytree(root / first, root / name)
        generator = torch.Generator().manual_seed(seed)
        edit_tensors(
            root / name,
            lambda tensors, generator=generator: {
                key: torch.randn(tensor.shape, generator=generator) * 0.4 for key, tensor in tensors.items()
            },
        )
    return root


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


in_threads = pytest.mark.parametrize("kind", ["threads"], indirect=True)


@pytest.fixture(scope="module")
def oracle(tiny_base, store) -> Callable[[int], dict[str, tuple[int, ...]]]:
    @functools.cache
    def first(number: int) -> dict[str, tuple[int, ...]]:
        model = AutoModelForCausalLM.from_pretrained(tiny_base)
        peft = Oracle(model, {name: store / name for name in NAMES[:number]})
        return {name: tuple(peft.generate(name, PROMPT, NUM_TOKENS)) for name in NAMES[:number]}

    return first


@pytest.fixture
def answers(kind, oracle) -> dict[str, tuple[int, ...]]:
    """What PEFT generates for each adapter of the test."""
    return oracle(len(NAMES) if kind == "processes" else len(NAMES) // 2)


@pytest.fixture
def serving(kind, tiny_base, store, tmp_path) -> Callable[..., Any]:
    def start(**settings: Any) -> Any:
        return replicas(kind, 3, tiny_base, store, tmp_path, **settings)

    return start


def ask(client: Client, name: str, tokens: int = NUM_TOKENS) -> tuple[int, ...]:
    result = client.generate(
        adapter=name, token_ids=PROMPT, max_new_tokens=tokens, temperature=0.0, ignore_eos=True
    )
    assert result.adapter == name
    return result.token_ids


def ask_all(client: Client, names: Iterable[str]) -> dict[str, tuple[int, ...]]:
    with ThreadPoolExecutor(8) as pool:
        return dict(zip(names, pool.map(lambda name: ask(client, name), names), strict=True))


def begin(client: Client, name: str, tokens: int) -> Stream:
    return client.stream(
        adapter=name, token_ids=PROMPT, max_new_tokens=tokens, temperature=0.0, ignore_eos=True
    )


def read(stream: Stream, tokens: list[int]) -> None:
    """Add what the stream gives until it ends or fails."""
    for delta in stream:
        tokens += delta.token_ids


def in_memory(replica: Replica) -> set[str]:
    with Client(replica.target) as client:
        return {a.name for a in client.adapters.list() if a.residency is not Residency.STORE}


def test_a_replica_that_dies_moves_its_adapters_alone_and_gives_no_wrong_answer(serving, answers):
    with (
        serving(drain_timeout=0.0) as [first, victim, last],
        Client(targets=[r.target for r in (first, victim, last)], affinity="adapter", timeout=120) as client,
    ):
        for _ in range(2):
            assert ask_all(client, answers) == answers
        before = [in_memory(replica) for replica in (first, victim, last)]
        assert sorted(name for place in before for name in place) == sorted(answers)  # each in one alone
        assert all(before)

        streams = {name: begin(client, name, LONG) for name in sorted(before[1])[:4]}
        given = {name: list(next(stream).token_ids) for name, stream in streams.items()}
        elsewhere = begin(client, min(before[0]), 300)
        others = list(next(elsewhere).token_ids)
        with ThreadPoolExecutor(4) as pool:
            unary = {name: pool.submit(ask, client, name, 200) for name in sorted(before[1])[-4:]}
            time.sleep(0.2)
            victim.kill()
            for name, stream in streams.items():
                with pytest.raises(Unavailable):
                    read(stream, given[name])
                assert tuple(given[name][:NUM_TOKENS]) == answers[name][: len(given[name])]
                assert tuple(given[name]) == ask(client, name, len(given[name]))
            for name, got in unary.items():
                assert got.result()[:NUM_TOKENS] == answers[name]
                assert got.result() == ask(client, name, 200)
        read(elsewhere, others)
        assert tuple(others) == elsewhere.result.token_ids
        assert (len(others), tuple(others[:NUM_TOKENS])) == (300, answers[min(before[0])])

        assert ask_all(client, answers) == answers
        after = [in_memory(replica) for replica in (first, last)]
        assert after[0] >= before[0]
        assert after[1] >= before[2]
        assert sorted(name for place in after for name in place) == sorted(answers)


class Load:
    """Threads that ask for one adapter after another and keep what failed or was wrong."""

    def __init__(self, client: Client, answers: dict[str, tuple[int, ...]]) -> None:
        self.num_calls = 0
        self.problems: list[object] = []
        self._client, self._answers = client, answers
        self._over = threading.Event()

    def _work(self, seed: int) -> None:
        chosen = random.Random(seed)
        while not self._over.is_set():
            name = chosen.choice(list(self._answers))
            try:
                if (got := ask(self._client, name)) != self._answers[name]:
                    self.problems.append((name, got))
            except HotswapError as error:
                self.problems.append(error)
            self.num_calls += 1

    @contextmanager
    def running(self, threads: int) -> Iterator[None]:
        with ThreadPoolExecutor(threads) as pool:
            workers = [pool.submit(self._work, seed) for seed in range(threads)]
            try:
                yield
            finally:
                self._over.set()
            for worker in workers:
                worker.result()

    def wait_for(self, calls: int) -> None:
        until = self.num_calls + calls
        wait_until(lambda: self.num_calls >= until or bool(self.problems), within=120)


@pytest.mark.parametrize("affinity", [None, pytest.param("adapter", marks=pytest.mark.slow)])
def test_a_rolling_restart_under_load_fails_no_unary_call(affinity, serving, answers):
    with serving() as servers:
        with Client(targets=[server.target for server in servers], affinity=affinity) as client:
            load = Load(client, answers)
            with load.running(4):
                for server in servers:
                    load.wait_for(30)
                    server.stop()
                    load.wait_for(30)  # on the two that are left
                    server.start()
                load.wait_for(30)
        assert load.problems == []


@in_threads
def test_the_asyncio_client_loses_no_call_to_a_restart_either(serving, answers):
    async def restart_under_load(servers: list[Replica]) -> None:
        async with AsyncClient(targets=[server.target for server in servers]) as client:

            async def asked(name: str) -> tuple[int, ...]:
                options = {"max_new_tokens": NUM_TOKENS, "temperature": 0.0, "ignore_eos": True}
                return (await client.generate(adapter=name, token_ids=PROMPT, **options)).token_ids

            restarted = asyncio.create_task(asyncio.to_thread(servers[0].stop))
            got: dict[str, tuple[int, ...]] = {}
            while not (got and restarted.done()):
                got = dict(zip(answers, await asyncio.gather(*map(asked, answers)), strict=True))
                assert got == answers
            await restarted

    with serving() as servers:
        asyncio.run(restart_under_load(servers))


@in_threads
def test_connections_that_are_made_anew_fail_no_call(serving, answers):
    with (
        serving(max_connection_age=0.3) as servers,
        Client(targets=[server.target for server in servers], affinity="adapter") as client,
    ):
        load = Load(client, answers)
        with load.running(2):
            time.sleep(1)
            load.wait_for(20)
    assert load.problems == []
