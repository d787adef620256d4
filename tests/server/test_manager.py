"""Slots: who has one, who must leave it, and what a request that runs can rely on."""

import random
import shutil
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, wait

import pytest
from hotswap.layout import publish
from hotswap.names import AdapterName
from hotswap_server.adapters.manager import AdapterManager
from hotswap_server.adapters.method import BankOptions
from hotswap_server.adapters.residency import InUse, Residency
from hotswap_server.core import AdapterRef
from hotswap_server.errors import AdapterInUseError, AdapterInvalidError, AdapterUnloadedError, CapacityError
from support.adapters import write_lora
from support.models import random_prompt
from support.running import SOON_S, Recorder, Running, wait_until

OPTIONS = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
PROMPT = random_prompt(6, seed=0)


@pytest.fixture(scope="module")
def sources(llama, tmp_path_factory):
    return [write_lora(llama, tmp_path_factory.mktemp("source"), seed=seed, **OPTIONS) for seed in range(5)]


@pytest.fixture
def store(sources, tmp_path):
    """`acme/a` to `acme/e`."""
    for name, source in zip("abcde", sources, strict=True):
        shutil.copytree(source, tmp_path / "acme" / name / "1")
    return tmp_path


@pytest.fixture
def manager(llama_base, store):
    recorder = Recorder()
    manager = AdapterManager(
        AdapterManager.open_store(str(store)), llama_base, BankOptions(num_slots=3), observer=recorder
    )
    manager.recorder = recorder
    yield manager
    manager.close()


def acquire(manager: AdapterManager, name: str) -> tuple[AdapterRef, int]:
    ref = manager.resolve(f"acme/{name}", None)
    slot: int | None = None

    def there() -> bool:
        nonlocal slot
        slot = manager.try_acquire(ref)
        return slot is not None

    manager.expect(ref)
    wait_until(there)
    assert slot is not None
    return ref, slot


def use(manager: AdapterManager, *names: str) -> list[AdapterRef]:
    refs = []
    for name in names:
        ref, _ = acquire(manager, name)
        manager.release(ref)
        refs.append(ref)
    return refs


def evicted(manager: AdapterManager) -> list[str]:
    return [ref.name[-1] for kind, ref in manager.recorder.adapter_events if kind == "evicted"]


def test_the_least_recently_used_leaves_first(manager):
    use(manager, "a", "b", "c", "a", "d", "e")
    assert evicted(manager) == ["b", "c"]
    use(manager, "c")
    assert evicted(manager) == ["b", "c", "a"]
    assert manager.slot_counts()["lora"] == (3, 3)


def test_a_slot_in_use_is_never_taken(manager):
    refs, slots = zip(*(acquire(manager, name) for name in "abc"), strict=True)
    assert len(set(slots)) == 3
    other = manager.resolve("acme/d", None)
    manager.expect(other)
    wait_until(lambda: manager.get("acme/d", None).residency is Residency.HOST)
    assert manager.try_acquire(other) is None
    assert evicted(manager) == []
    assert manager.users() == 3
    manager.release(refs[1])
    wait_until(lambda: manager.try_acquire(other) == slots[1])
    assert evicted(manager) == ["b"]


def test_users_share_a_slot_and_all_must_let_go(manager):
    ref, slot = acquire(manager, "a")
    assert acquire(manager, "a") == (ref, slot)
    use(manager, "b", "c", "d")
    manager.release(ref)
    use(manager, "b", "c", "d")
    assert "a" not in evicted(manager)
    assert manager.get("acme/a", None).running == 1
    manager.release(ref)
    use(manager, "b", "c", "d")
    assert "a" in evicted(manager)


def test_load_and_the_residency_it_shows(manager):
    assert manager.get("acme/a", None).residency is Residency.STORE
    info = manager.load("acme/a", None).result(SOON_S)
    assert (info.residency, info.running, info.num_parameters) == (Residency.DEVICE, 0, 512)
    assert info.details == {"r": "2", "lora_alpha": "4", "target_modules": '["q_proj"]'}
    assert manager.load("acme/a", 1).result(SOON_S).ref == info.ref
    use(manager, "b", "c", "d")
    assert manager.get("acme/a", None).residency is Residency.HOST
    assert [(info.ref.name, info.residency) for info in manager.list()] == [
        ("acme/a", Residency.HOST),
        ("acme/b", Residency.DEVICE),
        ("acme/c", Residency.DEVICE),
        ("acme/d", Residency.DEVICE),
        ("acme/e", Residency.STORE),
    ]


def test_unload_of_an_idle_adapter(manager):
    use(manager, "a", "b")
    assert manager.unload("acme/a", None, in_use=InUse.WAIT).result(SOON_S) == 1
    assert manager.get("acme/a", None).residency is Residency.STORE
    assert manager.unload("acme/a", None, in_use=InUse.WAIT).result(SOON_S) == 0
    assert manager.slot_counts()["lora"] == (1, 3)
    use(manager, "a")


def test_unload_refuses_while_in_use(manager):
    ref, _ = acquire(manager, "a")
    with pytest.raises(AdapterInUseError, match="1 running requests use acme/a"):
        manager.unload("acme/a", None, in_use=InUse.REFUSE)
    assert acquire(manager, "a")[0] == ref
    manager.release(ref)
    manager.release(ref)
    assert manager.unload("acme/a", None, in_use=InUse.REFUSE).result(SOON_S) == 1


def test_unload_drops_what_is_in_host_memory_alone(manager):
    use(manager, "a", "b", "c", "d")
    assert manager.get("acme/a", None).residency is Residency.HOST
    assert manager.unload("acme/a", None, in_use=InUse.REFUSE).result(SOON_S) == 1
    assert manager.get("acme/a", None).residency is Residency.STORE


def test_unload_waits_for_users_and_nobody_new_comes_in(manager):
    ref, _ = acquire(manager, "a")
    left = manager.unload("acme/a", None, in_use=InUse.WAIT)
    again = manager.unload("acme/a", 1, in_use=InUse.WAIT)
    manager.expect(ref)
    assert manager.try_acquire(ref) is None
    manager.forget(ref)
    assert not left.done()
    assert not again.done()
    manager.release(ref)
    assert left.result(SOON_S) == again.result(SOON_S) == 1
    assert use(manager, "a") == [ref]


def test_unload_of_what_is_being_loaded(manager, monkeypatch):
    gate = threading.Event()
    put = type(manager._banks["lora"]).put

    def slow(bank, slot, adapter):
        assert gate.wait(SOON_S)
        put(bank, slot, adapter)

    monkeypatch.setattr(type(manager._banks["lora"]), "put", slow)
    loading = manager.load("acme/a", None)
    wait_until(lambda: manager.slot_counts()["lora"] == (1, 3))
    left = manager.unload("acme/a", None, in_use=InUse.CANCEL)
    assert not left.done()
    gate.set()
    assert left.result(SOON_S) == 1
    loading.result(SOON_S)
    assert manager.slot_counts()["lora"] == (0, 3)


def test_the_engine_is_called_without_the_manager_s_lock(manager):
    """The engine calls back under its own lock, so holding both in either order would be a deadlock."""
    free = []

    def look(*args: AdapterRef) -> None:
        other = threading.Thread(target=manager.users)
        other.start()
        other.join(SOON_S)
        free.append(not other.is_alive())

    ref, _ = acquire(manager, "a")
    manager.cancel_users = manager.on_change = look
    left = manager.unload("acme/a", None, in_use=InUse.CANCEL)
    assert free == [True]
    manager.release(ref)
    assert left.result(SOON_S) == 1
    assert free == [True, True]


def test_unload_that_cancels_ends_the_requests(llama_base, tokenizer, store):
    with Running(llama_base, tokenizer, store) as running:
        mine = running.generate(PROMPT, "acme/a", max_new_tokens=900)
        other = running.generate(PROMPT, "acme/b", max_new_tokens=40)
        wait_until(lambda: mine.deltas and other.deltas)
        assert running.adapters.unload("acme/a", None, in_use=InUse.CANCEL).result(SOON_S) == 1
        with pytest.raises(AdapterUnloadedError, match="acme/a@1 was unloaded"):
            mine.result()
        assert len(other.result().tokens) == 40


def test_a_request_keeps_the_version_that_it_started_with(llama_base, tokenizer, store, sources):
    with Running(llama_base, tokenizer, store) as running:
        expected = {
            name: running.generate(PROMPT, f"acme/{name}", max_new_tokens=200).result().tokens
            for name in "ab"
        }
        assert expected["a"] != expected["b"]
        before = running.generate(PROMPT, "acme/a", max_new_tokens=200)
        wait_until(lambda: before.deltas)
        version = publish(
            store,
            AdapterName("acme", "a"),
            lambda directory: shutil.copytree(sources[1], directory, dirs_exist_ok=True),
        )
        after = running.generate(PROMPT, "acme/a", max_new_tokens=200)
        assert version == 2
        assert after.request.adapter.version == 2
        assert before.request.adapter.version == 1
        assert before.result().tokens == expected["a"]
        assert after.result().tokens == expected["b"]
        assert (
            running.generate(PROMPT, before.request.adapter, max_new_tokens=200).result().tokens
            == expected["a"]
        )


def test_a_fixed_adapter_works_at_once(llama_base, tokenizer, store, sources):
    weights = store / "acme" / "a" / "1" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with Running(llama_base, tokenizer, store) as running:
        for _ in range(2):
            with pytest.raises(AdapterInvalidError, match="truncated or damaged"):
                running.generate(PROMPT, "acme/a").result()
        assert running.recorder.count("failed") >= 1
        assert "truncated" in str(running.adapters.load("acme/a", None).exception(SOON_S))
        weights.write_bytes((sources[0] / weights.name).read_bytes())
        running.generate(PROMPT, "acme/a").result()
        assert running.adapters.slot_counts()["lora"] == (1, 8)


def test_many_threads_loading_unloading_and_requesting(llama_base, tokenizer, store):
    """Requests finish, are cancelled, or lose their adapter, and nothing hangs."""
    with Running(llama_base, tokenizer, store, slots=3, kv_pages=40) as running:
        expected = {
            name: running.generate(PROMPT, f"acme/{name}", max_new_tokens=12).result().tokens
            for name in "abcde"
        }
        until = time.monotonic() + 3

        def work(seed: int) -> int:
            rng, done = random.Random(seed), 0
            while time.monotonic() < until:
                name = rng.choice("abcde")
                match rng.randrange(6):
                    case 0:
                        running.adapters.unload(
                            f"acme/{name}", None, in_use=rng.choice([InUse.WAIT, InUse.CANCEL])
                        )
                    case 1:
                        running.adapters.load(f"acme/{name}", None)
                    case 2:
                        running.cancel(running.generate(PROMPT, f"acme/{name}", max_new_tokens=300))
                    case _:
                        outcome = running.generate(PROMPT, f"acme/{name}", max_new_tokens=12)
                        if outcome.error is None:
                            assert outcome.tokens == expected[name]
                            done += 1
                        else:
                            assert isinstance(outcome.error, AdapterUnloadedError)
            return done

        with ThreadPoolExecutor(6) as pool:
            workers = [pool.submit(work, seed) for seed in range(6)]
            assert not wait(workers, SOON_S).not_done, "a deadlock"
            assert sum(worker.result() for worker in workers) > 10
        wait_until(lambda: all(info.running == 0 for info in running.adapters.list()))
        for name, tokens in expected.items():
            assert running.generate(PROMPT, f"acme/{name}", max_new_tokens=12).result().tokens == tokens


def test_a_pinned_adapter_stays_and_counts_until_it_is_unpinned(manager):
    assert manager.pin("acme/a", None).result(SOON_S).pinned
    assert manager.pin("acme/b", None).result(SOON_S).residency is Residency.DEVICE
    assert manager.pin("acme/b", 1).result(SOON_S).pinned, "twice is once"
    with pytest.raises(CapacityError, match=r"2 of 3 lora slots hold adapters that are pinned.*unpin one"):
        manager.pin("acme/c", None)
    use(manager, "c", "d", "e", "c", "d")
    assert set(evicted(manager)) == {"c", "d", "e"}
    with pytest.raises(AdapterInUseError, match="acme/a is pinned; unpin it first"):
        manager.unload("acme/a", None, in_use=InUse.CANCEL)
    assert [info.ref.name for info in manager.unpin("acme/a", None)] == ["acme/a"]
    assert manager.unpin("acme/a", None) == []
    assert not manager.get("acme/a", None).pinned
    use(manager, "c", "d", "e")
    assert "a" in evicted(manager)
    assert "b" not in evicted(manager)


def test_what_is_merged_and_pinned_too_keeps_its_slot_when_another_one_is_merged(manager):
    b, c = (manager.resolve(f"acme/{name}", None) for name in "bc")
    manager.pin("acme/a", None).result(SOON_S)
    manager.hold(b).result(SOON_S)
    manager.pin("acme/b", None).result(SOON_S)
    with pytest.raises(CapacityError, match="2 of 3 lora slots"):
        manager.hold(c, instead_of=b)
    manager.unpin("acme/b", None)
    manager.hold(c, instead_of=b).result(SOON_S)
    with pytest.raises(CapacityError, match="2 of 3 lora slots"):
        manager.pin("acme/b", None)
    manager.let_go(b)
    use(manager, "d", "e")
    assert {"d", "e"} & set(evicted(manager)), "a slot is left for others"


def test_what_memory_has_is_listed_when_the_store_has_it_no_more(manager, store):
    manager.pin("acme/a", None).result(SOON_S)
    shutil.rmtree(store / "acme" / "a")
    listed = {info.ref.name: info for info in manager.list()}
    assert listed["acme/a"].pinned
    assert (listed["acme/a"].residency, listed["acme/a"].error) == (Residency.DEVICE, None)
    manager.unpin("acme/a", None)
    manager.unload("acme/a", None, in_use=InUse.REFUSE).result(SOON_S)
    assert "acme/a" not in {info.ref.name for info in manager.list()}


def test_a_pin_is_of_one_version(manager, store, sources):
    manager.pin("acme/a", None).result(SOON_S)
    shutil.copytree(sources[1], store / "acme" / "a" / "2")
    assert not manager.get("acme/a", None).pinned
    assert manager.get("acme/a", 1).pinned
    manager.pin("acme/a", None).result(SOON_S)
    assert [info.ref.version for info in manager.in_memory("acme/a", None)] == [1, 2]
    shutil.rmtree(store / "acme" / "a")
    assert [info.ref.version for info in manager.unpin("acme/a", None)] == [1, 2]


def test_a_pin_that_fails_takes_nothing(manager, store):
    weights = store / "acme" / "a" / "1" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(AdapterInvalidError, match="truncated"):
        manager.pin("acme/a", None).result(SOON_S)
    assert not manager.get("acme/a", None).pinned
    assert "truncated" in str(manager.get("acme/a", None).error)
    for name in "bc":
        manager.pin(f"acme/{name}", None).result(SOON_S)


def test_prefetch_takes_no_slot_and_spares_the_store(manager, store):
    assert manager.prefetch("acme/a", None).result(SOON_S).residency is Residency.HOST
    assert manager.slot_counts()["lora"] == (0, 3)
    ref = manager.resolve("acme/a", None)
    shutil.rmtree(store / "acme" / "a")
    manager.expect(ref)
    wait_until(lambda: manager.try_acquire(ref) is not None)
    manager.release(ref)
    assert manager.unload("acme/a", None, in_use=InUse.REFUSE).result(SOON_S) == 1


def test_an_adapter_that_leaves_the_device_leaves_no_tensors_in_host_memory(llama_base, store, manager):
    """Only the host cache keeps them, and that has a budget."""
    nbytes = manager.load("acme/a", None).result(SOON_S).nbytes
    small = AdapterManager(
        AdapterManager.open_store(str(store)),
        llama_base,
        BankOptions(num_slots=3),
        host_cache_bytes=2 * nbytes,
    )
    try:
        for name in "abcde":
            small.load(f"acme/{name}", None).result(SOON_S)
        assert small._cache.stats.bytes == 2 * nbytes
        assert small._cache.stats.leased_bytes == 0
        where = {info.ref.name[-1]: info.residency for info in small.list()}
        assert where == {"a": "store", "b": "store", "c": "device", "d": "device", "e": "device"}
        assert all(resident.adapter is None for resident in small._placement.residents.values())
    finally:
        small.close()


def test_requests_that_are_gone_leave_nothing_behind(manager):
    """Neither those whose adapter is on its way nor those of broken ones."""
    refs = [manager.resolve(f"acme/{name}", None) for name in "abcde"]
    held = [acquire(manager, name)[0] for name in "abc"]
    for ref in refs[3:] * 3:
        manager.expect(ref)
    wait_until(lambda: manager.get("acme/e", None).residency is Residency.HOST)
    for ref in refs[3:] * 3:
        manager.forget(ref)
    wait_until(lambda: set(manager._placement.residents) == set(held))
    assert manager._cache.stats.leased_bytes == 0
    for ref in held:
        manager.release(ref)
    assert evicted(manager) == []


def test_an_adapter_that_waits_is_not_overtaken_for_ever(manager):
    """All slots have requests that overlap without an end: the next comes before the last one has gone."""
    refs = [acquire(manager, name)[0] for name in "abc"]
    users = Counter(refs)
    waiting = manager.resolve("acme/d", None)
    manager.expect(waiting)
    for _ in range(200):
        for ref in refs:
            manager.expect(ref)
            users[ref] += manager.try_acquire(ref) is not None
            if users[ref]:
                manager.release(ref)
                users[ref] -= 1
        if manager.try_acquire(waiting) is not None:
            break
        time.sleep(0.001)
    else:
        pytest.fail("it waited through 200 steps")
    assert sum(ref in manager._placement.residents and users[ref] > 0 for ref in refs) == 2
