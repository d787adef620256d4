"""Device memory: as many slots as the budget holds, and never more bytes than were counted."""

import gc
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any

import pytest
import torch
from hotswap_server.adapters.manager import AdapterManager
from hotswap_server.adapters.method import AdapterBank, BankOptions, available_methods, slots_within
from hotswap_server.engine.base import BaseModel
from hotswap_server.errors import AdapterInvalidError, InvalidRequestError
from support.adapters import ALL_LINEARS, write_bottleneck, write_ia3, write_lora, write_prefix
from support.models import prepared
from support.running import SOON_S

OPTIONS = BankOptions(num_slots=3, max_lora_rank=4, max_bottleneck_size=8, max_prefix_tokens=10)


@pytest.fixture(scope="module")
def store(llama, tmp_path_factory):
    """Adapters that touch all there is, two of each method; the first as large as `OPTIONS` allow."""
    store = tmp_path_factory.mktemp("store")
    for name, size in {"large": 2, "small": 1}.items():
        embeddings = ["lm_head", "embed_tokens"][:size]
        write_lora(
            llama,
            store / "lora" / name / "1",
            r=2 * size,
            use_dora=size == 2,
            lora_bias=size == 1,
            target_modules=[*ALL_LINEARS, *embeddings],
        )
        write_bottleneck(llama, store / "bottleneck" / name / "1", bottleneck_size=4 * size)
        write_prefix(llama, store / "prefix" / name / "1", 5 * size)
        write_ia3(
            llama,
            store / "ia3" / name / "1",
            target_modules=[*ALL_LINEARS, "lm_head"],
            feedforward_modules=["down_proj", "o_proj", "lm_head"][: 3 * (size - 1)],
        )
    write_prefix(llama, store / "prefix" / "long" / "1", 11)
    return store


def tensors(value: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    """All that a bank reaches, but for the base's own."""
    if id(value) in seen or isinstance(value, BaseModel):
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for entry in value.values():
            yield from tensors(entry, seen)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from tensors(entry, seen)
    elif is_dataclass(value):
        for entry in fields(value):
            yield from tensors(getattr(value, entry.name), seen)
    elif type(value).__module__.startswith("hotswap_server.adapters"):
        yield from tensors(vars(value), seen)


def allocated(bank: AdapterBank, base: BaseModel) -> int:
    of_base = {id(group.bias) for group in base.projections}
    found = [tensor for tensor in tensors(bank, set()) if id(tensor) not in of_base]
    found += [t for prefix in base.prefixes.values() for t in (*prefix.keys, *prefix.values)]
    return sum(tensor.nbytes for tensor in found)


@pytest.mark.parametrize("method", sorted(available_methods()))
def test_a_full_bank_takes_what_was_counted(llama, store, method):
    base = prepared(llama, "reference")
    manager = AdapterManager(AdapterManager.open_store(str(store)), base, OPTIONS)
    try:
        manager.load(f"{method}/large", None).result(SOON_S)
        manager.load(f"{method}/small", None).result(SOON_S)
        counted = available_methods()[method].bank_bytes(base, OPTIONS)
        taken = allocated(manager._banks[method], base)
        if method == "prefix":  # which takes what its adapters have
            assert taken == counted / OPTIONS.num_slots * 1.5
        else:
            assert taken == counted
    finally:
        manager.close()
        gc.collect()


def test_the_budget_decides_the_slots(llama_base):
    def needed(num_slots: int) -> int:
        options = replace(OPTIONS, num_slots=num_slots)
        return sum(method.bank_bytes(llama_base, options) for method in available_methods().values())

    assert slots_within(llama_base, OPTIONS, 10 * needed(3)) == 3
    assert slots_within(llama_base, OPTIONS, needed(2)) == 2
    assert slots_within(llama_base, OPTIONS, needed(2) - 1) == 1
    assert slots_within(llama_base, replace(OPTIONS, num_slots=100), needed(50)) == 50
    with pytest.raises(
        InvalidRequestError, match=r"device_adapter_bytes: must hold a slot of every method.*lora"
    ):
        slots_within(llama_base, OPTIONS, needed(1) - 1)


def test_a_prefix_over_the_limit_is_refused(llama_base, store):
    manager = AdapterManager(AdapterManager.open_store(str(store)), llama_base, OPTIONS)
    try:
        with pytest.raises(
            AdapterInvalidError, match=r"num_virtual_tokens 11 is over this server's limit of 10"
        ):
            manager.load("prefix/long", None).result(SOON_S)
    finally:
        manager.close()
