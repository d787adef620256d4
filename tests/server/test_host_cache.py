import random
import threading

import pytest
from hotswap_server.adapters.host_cache import HostCache
from hotswap_server.errors import AdapterInUseError, CapacityError, OverloadedError


def filled(*digests: str, budget: int = 30) -> HostCache[str]:
    cache: HostCache[str] = HostCache(budget)
    for digest in digests:
        cache.put(digest, digest.upper(), 10)
    return cache


def test_the_least_recently_used_entry_goes_first():
    cache = filled("a", "b", "c")
    assert cache.get("a") == "A"
    cache.put("d", "D", 10)
    assert [digest for digest in "abcd" if digest in cache] == ["a", "c", "d"]
    cache.put("e", "E", 20)
    assert [digest for digest in "abcde" if digest in cache] == ["d", "e"]


def test_putting_again_refreshes_and_keeps_the_value():
    cache = filled("a", "b", "c")
    cache.put("a", "other", 10)
    cache.put("d", "D", 10)
    assert cache.get("a") == "A"
    assert "b" not in cache
    assert cache.stats.bytes == 30


def test_stats_count_hits_misses_and_evictions():
    cache = filled("a", "b", "c", "d")
    assert cache.get("a") is None
    assert cache.get("d") == "D"
    with cache.lease("d"):
        stats = cache.stats
    assert (stats.bytes, stats.leased_bytes, stats.entries) == (30, 10, 3)
    assert (stats.hits, stats.misses, stats.evictions) == (2, 1, 1)


def test_a_leased_entry_is_never_evicted():
    cache = filled("a", "b", "c")
    with cache.lease("a") as value, cache.lease("a"):
        assert value == "A"
        cache.put("d", "D", 20)
        assert [digest for digest in "abcd" if digest in cache] == ["a", "d"]
    assert cache.stats.leased_bytes == 0
    cache.put("e", "E", 20)
    assert "a" not in cache


def test_what_does_not_fit_beside_the_leased_evicts_nothing():
    cache = filled("a", "b", "c")
    with cache.lease("a"), pytest.raises(OverloadedError, match="10 of the host cache's 30 bytes are in use"):
        cache.put("d", "D", 21)
    assert [digest for digest in "abcd" if digest in cache] == ["a", "b", "c"]


def test_a_lease_ends_with_an_exception_too():
    cache = filled("a")
    with pytest.raises(ZeroDivisionError), cache.lease("a"):
        raise ZeroDivisionError
    assert cache.remove("a")


def test_pins_are_counted():
    cache = filled("a")
    assert cache.pin("a") == cache.pin("a") == "A"
    cache.unpin("a")
    with pytest.raises(AdapterInUseError, match="in use"):
        cache.remove("a")
    cache.unpin("a")
    with pytest.raises(KeyError):
        cache.unpin("a")
    assert cache.remove("a")
    assert not cache.remove("a")
    assert cache.stats.bytes == 0


def test_what_is_absent_cannot_be_leased_or_pinned():
    cache = filled()
    assert cache.pin("a") is None
    with pytest.raises(KeyError):
        cache.unpin("a")
    with pytest.raises(KeyError), cache.lease("a"):
        pass


def test_an_entry_over_the_budget_names_both_figures_and_the_flag():
    cache = filled("a")
    with pytest.raises(CapacityError, match=r"takes 31 bytes .* has 30; raise --host-cache-bytes"):
        cache.put("b", "B", 31)
    assert "a" in cache


def test_a_negative_budget_is_refused():
    with pytest.raises(ValueError, match="budget_bytes"):
        HostCache(-1)


def test_threads_never_see_a_broken_invariant():
    cache: HostCache[int] = HostCache(100)
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        randomness = random.Random(seed)
        try:
            for _ in range(500):
                key = randomness.randrange(10)
                value = cache.pin(str(key))
                if value is None:
                    cache.put(str(key), key, 10 + key)
                    continue
                assert value == key
                assert str(key) in cache
                cache.unpin(str(key))
                assert cache.stats.bytes <= 100
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    stats = cache.stats
    assert stats.leased_bytes == 0
    assert stats.bytes == sum(10 + key for key in range(10) if str(key) in cache)
