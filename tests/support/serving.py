"""A whole server in the event loop of a test."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial

from hotswap_server import app
from hotswap_server.config import load_settings

# `app.serve` with its settings, or `app.run` with what was loaded: only `ready` and `stop` are left to give.
Start = Callable[..., Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Serving:
    """A server that answers; it ends early when `stop` is set."""

    ready: app.Ready
    stop: asyncio.Event


@asynccontextmanager
async def serving(start: Start) -> AsyncIterator[Serving]:
    """What was started, until the end of the block. Raises what it fails with before it is ready."""
    ready: asyncio.Future[app.Ready] = asyncio.get_running_loop().create_future()
    stop = asyncio.Event()
    task = asyncio.ensure_future(start(ready.set_result, stop=stop))
    await asyncio.wait({task, ready}, return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        await task
    try:
        yield Serving(ready.result(), stop)
    finally:
        stop.set()
        await task


def serving_tiny(base: object, store: object, metrics_port: int, /, **flags: object):
    """`serving` with the settings that suit a tiny base, and `flags` over them."""
    options = {"base": str(base), "store": str(store), "kv_cache_bytes": "1MiB", "threads": 1}
    settings = load_settings(**(options | {"port": 0, "metrics_port": metrics_port} | flags))
    return serving(partial(app.serve, settings))
