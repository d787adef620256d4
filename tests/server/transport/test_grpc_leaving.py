"""A server that stops, behind a balancer that knows connections alone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from hotswap_client import AsyncClient


class Forwarder:
    """Sends every new connection to the port `to`, as kube-proxy does."""

    def __init__(self, to: int) -> None:
        self.to = to
        self._writers: list[asyncio.StreamWriter] = []

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", self.to)
        self._writers += [writer, back]
        await asyncio.gather(self._copy(reader, back), self._copy(there, writer))

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
        writer.close()

    def close(self) -> None:
        for writer in self._writers:
            writer.close()


@asynccontextmanager
async def forwarding(to: int) -> AsyncIterator[tuple[Forwarder, str]]:
    forwarder = Forwarder(to)
    listening = await asyncio.start_server(forwarder.accept, "127.0.0.1", 0)
    try:
        yield forwarder, f"127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    finally:
        listening.close()
        forwarder.close()
        await listening.wait_closed()


async def test_callers_of_a_server_that_stops_go_to_another_while_their_streams_end_here(serving):
    async with (
        serving() as old,
        serving() as new,
        forwarding(old.bound.port) as (balancer, target),
        AsyncClient(target) as client,
    ):
        old.engine.num_tokens, old.engine.pause = 200, 0.01
        stream = client.stream(prompt="x")
        given = [(await anext(stream)).text]
        balancer.to = new.bound.port
        stopping = asyncio.create_task(old.server.stop(60))
        while not old.engine.draining:
            await asyncio.sleep(0.01)
        for _ in range(20):
            assert (await client.generate(prompt="x")).text == "ABC"
        assert not stopping.done()
        given += [delta.text async for delta in stream]
        assert sum(map(len, given)) == 200
        await stopping
    assert len(new.engine.requests) == 20
