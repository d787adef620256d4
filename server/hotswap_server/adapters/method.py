"""What a method is to the server: how it reads a checkpoint, and the bank that its adapters run from.

A method is one module in `methods/` with a `METHOD` that has these attributes; nothing else names it.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Protocol, runtime_checkable

from hotswap_server.adapters.checkpoint import RawCheckpoint
from hotswap_server.engine.base import BaseModel
from hotswap_server.errors import AdapterInvalidError, InvalidRequestError
from hotswap_server.kernels import LowRankUpdate


class MethodAdapter(Protocol):
    """An adapter in host memory, checked against the base. `details` come from `shown_fields`."""

    @property
    def method(self) -> str: ...

    @property
    def nbytes(self) -> int: ...

    @property
    def num_parameters(self) -> int: ...

    @property
    def details(self) -> Mapping[str, str]: ...


class AdapterBank(Protocol):
    """Device memory for `num_slots` adapters of one method, attached to the base when it was made.

    `put` may run on any thread while other slots are in use by a step; the manager hands out each slot once.
    """

    num_slots: int

    def put(self, slot: int, adapter: Any) -> None: ...


@runtime_checkable
class ClearableBank(Protocol):
    """A bank that has something to take back when an adapter leaves its slot, whose users have all ended."""

    def clear(self, slot: int) -> None: ...


@dataclass(frozen=True, slots=True)
class BankOptions:
    """Sizes fixed at start."""

    num_slots: int = 16
    max_lora_rank: int = 64
    max_bottleneck_size: int = 256
    max_prefix_tokens: int = 512


class Method(Protocol):
    """`name` as in responses and metrics, `peft_type` as in `adapter_config.json`."""

    name: str
    peft_type: str

    def parse(self, checkpoint: RawCheckpoint, base: BaseModel, options: BankOptions) -> MethodAdapter:
        """Check every field and tensor.

        Raises:
            AdapterInvalidError: something does not fit or would be left out; the message names it.
        """
        ...

    def create_bank(self, base: BaseModel, options: BankOptions) -> AdapterBank: ...

    def bank_bytes(self, base: BaseModel, options: BankOptions) -> int:
        """The most device memory that a bank can come to take, every slot at the limits of `options`."""
        ...


def slots_within(base: BaseModel, options: BankOptions, budget: int) -> int:
    """How many slots, `options.num_slots` at most, all methods can have together in `budget` bytes.

    Raises:
        InvalidRequestError: not even one.
    """

    def needed(num_slots: int) -> int:
        given = replace(options, num_slots=num_slots)
        return sum(method.bank_bytes(base, given) for method in available_methods().values())

    num_slots = bisect_right(range(1, options.num_slots + 1), budget, key=needed)
    if num_slots == 0:
        parts = {
            name: method.bank_bytes(base, replace(options, num_slots=1))
            for name, method in available_methods().items()
        }
        shown = ", ".join(f"{name} {nbytes}" for name, nbytes in parts.items())
        raise InvalidRequestError(
            "device_adapter_bytes",
            f"must hold a slot of every method, {needed(1)} bytes ({shown}), got {budget}; or lower "
            "max_lora_rank, max_bottleneck_size or max_prefix_tokens",
        )
    return num_slots


@runtime_checkable
class MergeableMethod(Protocol):
    """A method whose adapters change the base's weights and biases."""

    def updates(self, adapter: Any) -> Mapping[str, LowRankUpdate]:
        """What an adapter of this method makes of each module, by name."""
        ...


@cache
def available_methods() -> Mapping[str, Method]:
    """The methods in `methods/`, by name."""
    from hotswap_server.adapters import methods

    found: dict[str, Method] = {}
    for module in pkgutil.iter_modules(methods.__path__):
        method: Method = importlib.import_module(f"{methods.__name__}.{module.name}").METHOD
        found[method.name] = method
    return found


def shown_fields(config: Mapping[str, object], names: Iterable[str]) -> dict[str, str]:
    """The fields of an `adapter_config.json` that have a value, as JSON: what `details` holds."""
    return {name: json.dumps(config[name]) for name in names if config.get(name)}


def method_of(config: Mapping[str, object]) -> str:
    """The name of the method that an `adapter_config.json` is of.

    Raises:
        AdapterInvalidError: it is of none that is served here.
    """
    peft_type = config.get("peft_type")
    for method in available_methods().values():
        if method.peft_type == peft_type:
            return method.name
    served = ", ".join(sorted(method.peft_type for method in available_methods().values()))
    raise AdapterInvalidError(
        f"adapter_config.json: peft_type {peft_type!r} is not served; train with one that is: {served}"
    )
