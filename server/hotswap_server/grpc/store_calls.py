"""Calls that block on the store, on threads of their own and for a limited time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

from hotswap_server.errors import StoreUnavailableError

T = TypeVar("T")

_NUM_THREADS: Final = 16


class StoreCalls:
    """A store that hangs takes these threads and no others, so requests for the base go on."""

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._threads = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="store")

    async def run(self, call: Callable[[], T]) -> T:
        """The result of `call`.

        Raises:
            StoreUnavailableError: it, or those before it, took longer than the timeout in seconds.
        """
        try:
            async with asyncio.timeout(self._timeout):
                return await asyncio.get_running_loop().run_in_executor(self._threads, call)
        except TimeoutError:
            raise StoreUnavailableError(
                f"the store did not answer within {self._timeout:g} s; retry later"
            ) from None

    def close(self) -> None:
        """Give up what has not begun. A thread that hangs is left to itself."""
        self._threads.shutdown(wait=False, cancel_futures=True)
