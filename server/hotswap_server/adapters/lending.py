"""Slots for measurements: of adapters that are on the device, or of made-up ones in free slots."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import structlog

from hotswap_server.adapters.checkpoint import RawCheckpoint
from hotswap_server.adapters.method import BankOptions, Method, MethodAdapter
from hotswap_server.adapters.placement import Placement
from hotswap_server.adapters.residency import Residency
from hotswap_server.adapters.synthetic import typical
from hotswap_server.core import AdapterRef
from hotswap_server.engine.base import BaseModel
from hotswap_server.errors import AdapterInvalidError

_log = structlog.get_logger(__name__)


class Lender:
    """Nothing that it does counts as a use: which adapter is evicted next stays as it was."""

    def __init__(
        self, base: BaseModel, methods: Mapping[str, Method], options: BankOptions, placement: Placement
    ) -> None:
        self._base = base
        self._methods = methods
        self._options = options
        self._placement = placement
        self.borrow = placement.borrow
        self.release = placement.release

    @property
    def methods(self) -> tuple[str, ...]:
        return tuple(self._methods)

    def on_device(self) -> dict[str, list[AdapterRef]]:
        """By method, the smallest adapter first."""
        found: dict[str, list[AdapterRef]] = {}
        here = [r for r in self._placement.adapters_in_memory() if r.tier is Residency.DEVICE]
        for resident in sorted(here, key=lambda resident: (resident.nbytes, str(resident.ref))):
            found.setdefault(resident.ref.method, []).append(resident.ref)
        return found

    @contextmanager
    def made_up(self, method: str, count: int) -> Iterator[list[tuple[AdapterRef, int]]]:
        """Up to `count` made-up adapters in free slots, no more than half of these, so that others go on.

        Empty where none is free, or none can be made up. The slots are given back at the end.
        """
        adapter = self._make(method)
        if adapter is None:
            yield []
            return
        taken = self._placement.take_free(method, [made_up_ref(method, index) for index in range(count)])
        try:
            for resident in taken:
                self._placement.fill(resident, adapter).result()
            yield [(resident.ref, resident.slot) for resident in taken if resident.slot is not None]
        finally:
            self._placement.give_back(taken)

    def _make(self, method: str) -> MethodAdapter | None:
        content = typical(method, self._base, self._options)
        if content is None:
            return None
        config, tensors = content
        nbytes = sum(tensor.nbytes for tensor in tensors.values())
        checkpoint = RawCheckpoint(made_up_ref(method, 0), config, tensors, nbytes)
        try:
            return self._methods[method].parse(checkpoint, self._base, self._options)
        except AdapterInvalidError as error:
            _log.info("no_adapter_to_measure", method=method, reason=str(error))
            return None


def made_up_ref(method: str, index: int) -> AdapterRef:
    """No adapter of a store is called so."""
    return AdapterRef(f"_made_up/{method}", index + 1, f"made-up-{method}", method)
