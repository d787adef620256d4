"""Everything that happens to a server, at once and for long: no answer is wrong, and nothing is left."""

import asyncio
import gc
import os
import random
import statistics
import threading
import time
from functools import partial
from pathlib import Path

import psutil
import pytest
from hotswap_client import AsyncClient, ServingPath
from hotswap_server import app
from hotswap_server.config import load_settings
from hotswap_server.engine.sequence import Sequence
from support.adapters import write_lora
from support.serving import serving
from support.soaking import BROKEN, WRITERS, Soak, answer_alone, documented_errors

SECONDS = 60.0
LONG_SECONDS = float(os.environ.get("HOTSWAP_SOAK_SECONDS", "600"))
PAGE = Path(__file__).parents[2] / "docs/operating.md"
FLAT = 1.03  # of resident memory, after the first fifth of the time
CONTENTS = 2


@pytest.fixture(scope="module")
def answers(llama, llama_base, tokenizer, tmp_path_factory):
    return answer_alone(llama, llama_base, tokenizer, tmp_path_factory.mktemp("contents"), CONTENTS)


@pytest.fixture
def loaded(llama, llama_directory, tmp_path):
    broken = write_lora(llama, tmp_path / "store" / BROKEN / "1", r=2, target_modules=["q_proj"])
    (broken / "adapter_model.safetensors").write_bytes(b"no such thing")
    return app.load(
        load_settings(
            base=str(llama_directory),
            store=str(tmp_path / "store"),
            kv_cache_bytes="256KiB",  # fewer pages than its callers want,
            page_size=4,
            host_cache_bytes="384KiB",  # fewer adapters than there are,
            adapter_slots=2,  # and fewer slots of LoRAs
            max_batch_tokens=96,
            threads=1,
            port=0,
            metrics_port=0,
        )
    )


def value(loaded: app.Loaded, name: str) -> float:
    """The sum of a metric's series."""
    families = loaded.metrics.registry.collect()
    values = [sample.value for family in families for sample in family.samples if sample.name == name]
    assert values, f"no metric {name}"
    return sum(values)


def live_threads() -> set[threading.Thread]:
    """Without the one that gRPC keeps for all channels and servers of a process."""
    return {thread for thread in threading.enumerate() if "_poll_wrapper" not in thread.name}


def live_sequences() -> int:
    gc.collect()
    return sum(type(thing) is Sequence for thing in gc.get_objects())


async def idle(loaded: app.Loaded) -> None:
    """Nothing runs and no page is held but by prefixes."""
    async with asyncio.timeout(60):
        while (
            value(loaded, "hotswap_requests_running")
            or value(loaded, "hotswap_requests_waiting")
            or value(loaded, "hotswap_kv_pages_used") != value(loaded, "hotswap_kv_pages_prefixes")
            or loaded.adapters.users()
        ):
            await asyncio.sleep(0.02)


@pytest.mark.parametrize(
    "seconds", [SECONDS, pytest.param(LONG_SECONDS, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])]
)
def test_nothing_is_wrong_and_nothing_is_left(seconds, loaded, answers, tmp_path, caplog):
    threads, sequences = live_threads(), live_sequences()
    memory: list[float] = []

    async def watch() -> None:
        while True:
            memory.append(psutil.Process().memory_info().rss)
            await asyncio.sleep(seconds / 200)

    async def soak() -> Soak:
        async with (
            serving(partial(app.run, loaded)) as server,
            AsyncClient(server.ready.address, retries=0, timeout=60) as client,
        ):
            soak = Soak(client, answers, tmp_path / "store", documented_errors(PAGE), random.Random(0))
            for name in WRITERS:
                soak.publish(name)
            watching = asyncio.create_task(watch())
            await soak.run(seconds)
            watching.cancel()
            await idle(loaded)
            await soak.empty()
            await idle(loaded)
            assert value(loaded, "hotswap_kv_pages_used") == 0
            assert {taken for taken, _ in loaded.adapters.slot_counts().values()} == {0}
            assert loaded.adapters._cache.stats.leased_bytes == 0
            assert loaded.adapters._cache.stats.entries == 0
            return soak

    soaked = asyncio.run(soak())
    told = "\n".join(f"{count:6} {what}" for what, count in sorted(soaked.counts.items()))
    first, last = (statistics.median(memory[part]) / 2**20 for part in (slice(40, 80), slice(-40, None)))
    print(f"{told}\n{dict(soaked.paths)}\nresident MiB: {first:.1f}, then {last:.1f}")
    assert soaked.wrong == []
    assert soaked.undocumented == []
    assert set(soaked.paths) == {ServingPath.BASE, ServingPath.BATCHED, ServingPath.MERGED}
    for what in ("hotswap_preemptions_total", "hotswap_adapter_evictions_total"):
        assert value(loaded, what) > 0, what
    if seconds >= LONG_SECONDS:
        assert last <= first * FLAT
    until = time.monotonic() + 10
    while (left := live_threads() - threads) and time.monotonic() < until:
        time.sleep(0.05)
    assert left == set()
    assert live_sequences() <= sequences
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == []
