"""What the manager tells of each tier, and when one adapter counts as swapped for another."""

import pytest
from hotswap_server.adapters.manager import AdapterManager
from hotswap_server.adapters.method import BankOptions
from hotswap_server.adapters.residency import InUse, Residency
from support.adapters import write_lora
from support.running import SOON_S


@pytest.fixture
def manager(llama, llama_base, tmp_path):
    for seed, name in enumerate("ab"):
        write_lora(llama, tmp_path / "acme" / name / "1", seed=seed, r=4, target_modules=["q_proj"])
    manager = AdapterManager(AdapterManager.open_store(str(tmp_path)), llama_base, BankOptions(1))
    yield manager
    manager.close()


def places(manager) -> set[tuple[str, Residency]]:
    return {(resident.ref.name, resident.tier) for resident in manager.adapters_in_memory()}


def test_a_tier_lists_what_it_holds_and_a_swap_is_no_unload(manager):
    manager.load("acme/a", None).result(SOON_S)
    assert ("acme/a", Residency.DEVICE) in places(manager)
    assert manager.slot_stats()["lora"].swaps == 0
    manager.load("acme/b", None).result(SOON_S)
    assert ("acme/a", Residency.DEVICE) not in places(manager)
    assert {("acme/b", Residency.DEVICE), ("acme/a", Residency.HOST)} <= places(manager)
    assert all(resident.nbytes > 0 for resident in manager.adapters_in_memory())
    assert manager.slot_stats()["lora"].swaps == 1
    for name in ("acme/a", "acme/b"):
        manager.unload(name, None, in_use=InUse.REFUSE).result(SOON_S)
    assert places(manager) == set()
    assert manager.slot_stats()["lora"].swaps == 1
    assert manager.slot_stats()["lora"].bank_bytes > 0
