"""Adapters that are brought to memory before the server is ready."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from concurrent.futures import Future

import structlog

from hotswap_server.adapters.manager import AdapterManager
from hotswap_server.adapters.residency import AdapterInfo
from hotswap_server.errors import HotswapError

_log = structlog.get_logger(__name__)


def preload(manager: AdapterManager, *, pinned: Iterable[str], names: Iterable[str]) -> None:
    """Pin `pinned`, then bring `names` as near as there is room for; each as `tenant/name`,
    `tenant/name@3` or `tenant/name@stable`.

    The first go to the device while it has free slots of their method, the others to host memory. Returns
    when all are there. One that fails is logged and left out, so that it keeps no server from starting.
    """
    free = Counter({method: total - taken for method, (taken, total) in manager.slot_counts().items()})
    underway: list[tuple[str, Future[AdapterInfo]]] = []
    for text, keep in (*((text, True) for text in pinned), *((text, False) for text in names)):
        try:
            ref = manager.resolve(text, None)
            bring = manager.pin if keep else manager.load if free[ref.method] > 0 else manager.prefetch
            underway.append((text, bring(ref.name, ref.version)))
            free[ref.method] -= 1
        except HotswapError as error:
            _log.warning("adapter_not_preloaded", adapter=text, error=str(error))
    for text, loaded in underway:
        try:
            info = loaded.result()
            _log.info("adapter_preloaded", adapter=str(info.ref), residency=info.residency.value)
        except HotswapError as error:
            _log.warning("adapter_not_preloaded", adapter=text, error=str(error))
