"""A server driven to all of its bounds at once takes no more memory than they allow, for however long."""

import asyncio
import itertools
import random
import time
from collections import Counter

import grpc
import psutil
import pytest
from hotswap.v1 import common_pb2, inference_pb2, inference_pb2_grpc
from hotswap_server.engine.service import MAX_UNREAD
from support.adapters import write_lora
from support.replicas import replicas

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

PHASES, PHASE_S = 3, 20.0
CALLERS = 500  # more than may call
ADAPTERS = 40  # more than host memory has room for
SETTINGS = {
    "max_calls": 300,
    "max_inflight_bytes": "2MiB",
    "max_message_bytes": "64KiB",
    "max_queue": 150,
    "max_queue_tokens": 20_000,
    "host_cache_bytes": "512KiB",
    "kv_cache_bytes": "1MiB",
    "adapter_slots": 4,
    "max_timeout": 5,
}
UNREAD_BYTES = MAX_UNREAD * 2400  # of tokens with 20 logprobs each, as docs/operating.md says
# Beside the answers: requests in several forms, the adapters on their way, and what an allocator keeps.
ALLOWANCE_BYTES = 200 << 20
STEADY = 1.05
EXPECTED = {
    grpc.StatusCode.OK,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.CANCELLED,
}


@pytest.fixture
def store(llama, tmp_path):
    for number in range(ADAPTERS):
        write_lora(llama, tmp_path / "store" / f"t{number}" / "a" / "1", r=8, target_modules=["q_proj"])
    return tmp_path / "store"


def sampling(tokens: int) -> inference_pb2.SamplingParams:
    return inference_pb2.SamplingParams(
        max_new_tokens=tokens, temperature=1.0, ignore_eos=True, logprobs=20, stop=["x" * 60] * 4
    )


def text(chosen: random.Random, longest: int) -> common_pb2.Input:
    ids = [chosen.randrange(5, 60) for _ in range(chosen.randrange(1, longest))]
    return common_pb2.Input(token_ids=common_pb2.TokenIds(ids=ids))


async def call_until(until: float, stub, chosen: random.Random, codes: Counter) -> None:
    """One caller: long prompts and answers, scores, too large messages, and streams that it does not read."""
    while time.monotonic() < until:
        adapter = f"t{chosen.randrange(ADAPTERS)}/a" if chosen.random() < 0.7 else ""
        kind = chosen.choice(("generate", "unread", "score", "large"))
        try:
            if kind == "generate":
                request = inference_pb2.GenerateRequest(
                    adapter=adapter, input=text(chosen, 200), sampling=sampling(100)
                )
                await stub.Generate(request, timeout=8)
            elif kind == "unread":
                request = inference_pb2.GenerateStreamRequest(
                    adapter=adapter, input=text(chosen, 20), sampling=sampling(2000)
                )
                stream = stub.GenerateStream(request, timeout=8)
                await stream.read()
                await asyncio.sleep(chosen.random() * 6)
                stream.cancel()
            elif kind == "score":
                await stub.Score(
                    inference_pb2.ScoreRequest(adapter=adapter, context=text(chosen, 5), text="word " * 150),
                    timeout=8,
                )
            else:
                large = common_pb2.Input(prompt="long " * chosen.randrange(5_000, 15_000))
                await stub.Generate(inference_pb2.GenerateRequest(input=large), timeout=8)
            codes[grpc.StatusCode.OK] += 1
        except grpc.aio.AioRpcError as error:
            codes[error.code()] += 1
            await asyncio.sleep(0.05)


def test_a_server_at_all_its_bounds_stays_within_them(llama_directory, store, tmp_path):
    codes: Counter[grpc.StatusCode] = Counter()
    peaks: list[int] = []
    with replicas("processes", 1, llama_directory, store, tmp_path, **SETTINGS) as [replica]:
        process = psutil.Process(replica._process.pid)
        idle = process.memory_info().rss

        async def flood(phase: int) -> int:
            peak, until = 0, time.monotonic() + PHASE_S
            async with grpc.aio.insecure_channel(replica.target) as channel:
                stub = inference_pb2_grpc.InferenceServiceStub(channel)
                callers = asyncio.gather(
                    *(
                        call_until(until, stub, random.Random(f"{phase} {caller}"), codes)
                        for caller in range(CALLERS)
                    )
                )
                while not callers.done():
                    peak = max(peak, process.memory_info().rss)
                    await asyncio.sleep(0.1)
                await callers
            return peak

        for phase in range(PHASES):
            peaks.append(asyncio.run(flood(phase)))
        assert process.is_running()
    print(f"idle {idle / 2**20:.0f} MiB, peaks {[round(peak / 2**20) for peak in peaks]} MiB, {dict(codes)}")
    assert codes.keys() <= EXPECTED
    assert codes[grpc.StatusCode.RESOURCE_EXHAUSTED]
    assert codes[grpc.StatusCode.OK]
    assert max(peaks) - idle < UNREAD_BYTES + ALLOWANCE_BYTES
    assert all(later <= STEADY * earlier for earlier, later in itertools.pairwise(peaks[1:]))
