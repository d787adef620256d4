import asyncio

import pytest
from hotswap_server.adapters.manager import AdapterManager
from hotswap_server.core import Delta, Finished, GenerateRequest, SamplingParams, ScoreRequest
from hotswap_server.engine.service import EngineService
from hotswap_server.errors import DrainingError, InvalidRequestError, OverloadedError
from support.models import generate_greedily, random_prompt

PROMPT = random_prompt(10, seed=2)


@pytest.fixture
async def service(llama_base, tokenizer, tmp_path):
    adapters = AdapterManager(AdapterManager.open_store(str(tmp_path)), llama_base)
    service = EngineService(llama_base, tokenizer, adapters)
    yield service
    await asyncio.to_thread(service.close)
    stats = service.stats()
    assert (stats.running, stats.waiting, stats.kv_pages_used) == (0, 0, 0)


def request(new: int, name: str = "x") -> GenerateRequest:
    return GenerateRequest(name, PROMPT, SamplingParams(max_new_tokens=new, temperature=0, ignore_eos=True))


async def idle(service: EngineService) -> None:
    async with asyncio.timeout(30):
        while service.stats().kv_pages_used or service.stats().running or service.stats().waiting:
            await asyncio.sleep(0.001)


async def test_requests_side_by_side(service, llama):
    async def tokens(new: int) -> list[int]:
        events = [event async for event in service.generate(request(new, str(new)))]
        assert isinstance(events[-1], Finished)
        return [token for event in events[:-1] for token in event.token_ids]

    lengths = (3, 20, 11)
    expected = generate_greedily(llama, PROMPT, max(lengths))
    for got, new in zip(await asyncio.gather(*map(tokens, lengths)), lengths, strict=True):
        assert got == expected[:new]


async def test_leaving_the_iterator_cancels(service):
    events = service.generate(request(1000))
    async for event in events:
        assert isinstance(event, Delta)
        break
    await events.aclose()
    await idle(service)


async def test_an_event_for_a_stream_that_has_left_harms_no_other(service, monkeypatch):
    sinks, submit = [], service._engine.submit

    def submitted(request, sink):
        sinks.append(sink)
        submit(request, sink)

    monkeypatch.setattr(service._engine, "submit", submitted)
    events = service.generate(request(1000))
    await anext(events)
    await events.aclose()
    sinks[0](Delta((1,), "late"))  # or those behind it in the step's events would not be delivered
    await idle(service)


async def test_an_answer_that_nobody_reads_is_kept_up_to_a_share_and_then_given_up(service, monkeypatch):
    monkeypatch.setattr("hotswap_server.engine.service.MAX_UNREAD", 20)
    monkeypatch.setattr("hotswap_server.engine.service._LEAST_UNREAD", 10)
    events = service.generate(request(900))
    await anext(events)
    await idle(service)
    with pytest.raises(OverloadedError, match="read it as it comes"):
        async for _ in events:
            pass
    assert [event async for event in service.generate(request(15))], "others go on"


async def test_cancelling_the_task_cancels(service):
    async def consume() -> None:
        async for _ in service.generate(request(1000)):
            pass

    task = asyncio.create_task(consume())
    while not service.stats().running:
        await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await idle(service)


async def test_a_score_and_its_cancellation(service):
    scored = await service.score(ScoreRequest("score", PROMPT))
    assert len(scored.logprobs) == 9
    task = asyncio.create_task(service.score(ScoreRequest("long", random_prompt(1000, seed=1))))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await idle(service)


async def test_errors_are_raised_where_the_request_is_made(service):
    with pytest.raises(InvalidRequestError, match="text: "):
        await service.score(ScoreRequest("score", PROMPT[:1]))
    with pytest.raises(InvalidRequestError, match="input: "):
        await anext(service.generate(GenerateRequest("x", (), SamplingParams())))


async def test_draining_lets_requests_finish(service):
    events = service.generate(request(100))
    await anext(events)
    await service.drain(30)
    rest = [event async for event in events]
    assert len(rest) == 100
    with pytest.raises(DrainingError):
        await anext(service.generate(request(1)))


async def test_a_drain_that_takes_too_long_fails_the_rest(service):
    events = service.generate(request(1000))
    await anext(events)
    await service.drain(0.01)
    await asyncio.to_thread(service.close)
    with pytest.raises(DrainingError):
        async for _ in events:
            pass
