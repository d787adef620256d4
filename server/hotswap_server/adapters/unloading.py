"""Taking versions from device and host memory, with or without waiting for the requests that use them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import Future

from hotswap_server.adapters.placement import Placement
from hotswap_server.adapters.residency import InUse
from hotswap_server.adapters.slots import State
from hotswap_server.core import AdapterRef
from hotswap_server.errors import AdapterInUseError


def unload(
    placement: Placement,
    name: str,
    version: int | None,
    in_use: InUse,
    *,
    cancel_users: Callable[[AdapterRef], None],
    changed: Callable[[], None],
) -> Future[int]:
    """See `AdapterManager.unload`."""
    done: Future[int] = Future()
    done.set_running_or_notify_cancel()
    with placement.acting():
        leaving = placement.matching(name, version)
        if any(resident.pinned for resident in leaving):
            raise AdapterInUseError(f"{name} is pinned; unpin it first", adapter=name)
        if any(resident.held for resident in leaving):
            raise AdapterInUseError(f"{name} is merged; unmerge it first", adapter=name)
        users = sum(resident.users for resident in leaving)
        if users and in_use is InUse.REFUSE:
            raise AdapterInUseError(
                f"{users} running requests use {name}; wait for them, or set in_use to wait or cancel",
                adapter=name,
            )
        host_only = placement.host_copies.of(name, version) - {resident.ref for resident in leaving}
        for ref in host_only:
            placement.host_copies.drop(ref)
        parts: list[Future[None]] = []
        left_now = False
        for resident in leaving:
            resident.leaving = True
            part: Future[None] = Future()
            part.set_running_or_notify_cancel()
            parts.append(part)
            resident.on_left.append(part)
            if resident.users == 0 and resident.state not in (State.FETCHING, State.PLACING):
                left_now = True
                placement.leave(resident)
                placement.advance(resident.ref.method)
    # Without the lock: the engine takes its own first, and this one when it lets go of a slot.
    for resident in leaving if in_use is InUse.CANCEL else []:
        cancel_users(resident.ref)
    if not parts:
        done.set_result(len(host_only))
    remaining = itertools.count(len(parts) - 1, -1)

    def one_left(_: Future[None]) -> None:
        if next(remaining) == 0:
            done.set_result(len(parts) + len(host_only))

    for part in parts:
        part.add_done_callback(one_left)
    if left_now:
        # What the engine keeps for a version that has left, it can let go of.
        changed()
    return done
