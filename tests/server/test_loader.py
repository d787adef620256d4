import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
import structlog
from hotswap_server.adapters.checkpoint import AdapterChangedError, RawCheckpoint
from hotswap_server.adapters.host_cache import HostCache
from hotswap_server.adapters.loader import Loader
from hotswap_server.core import AdapterRef
from hotswap_server.errors import (
    AdapterInvalidError,
    AdapterNotFoundError,
    CapacityError,
    DrainingError,
    StoreDeniedError,
    StoreUnavailableError,
)

SOON_S = 10.0


@dataclass(frozen=True)
class Adapter:
    digest: str
    nbytes: int = 10
    method: str = "lora"


@dataclass
class FakeStore:
    """Answers reads with what `script` gives for the number of the read, from 0; an exception is raised."""

    script: Callable[[int], Exception | None] = lambda read: None
    reads: list[str] = field(default_factory=list)
    gate: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.gate.set()

    def read(self, ref: AdapterRef) -> RawCheckpoint:
        self.reads.append(ref.digest)
        error = self.script(len(self.reads) - 1)
        assert self.gate.wait(SOON_S)
        if error is not None:
            raise error
        return RawCheckpoint(ref, {}, {}, 0)


def ref(digest: str) -> AdapterRef:
    return AdapterRef("acme/support", 1, digest, "lora")


@pytest.fixture(autouse=True)
def _quiet():
    with structlog.testing.capture_logs():
        yield


@contextmanager
def loader_of(store: FakeStore, budget: int = 100, **options: float) -> Iterator[Loader[Adapter]]:
    options = {"backoff_s": 0.001, **options}
    loader = Loader(store, HostCache(budget), lambda raw: Adapter(raw.ref.digest), **options)  # type: ignore[arg-type]
    try:
        yield loader
    finally:
        store.gate.set()
        loader.close()


def wait_until(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + SOON_S
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.001)


def test_a_loaded_adapter_is_served_from_the_cache():
    store = FakeStore()
    with loader_of(store) as loader:
        first = loader.load(ref("a")).result(SOON_S)
        again = loader.load(ref("a"))
        assert again.done()
        assert again.result() is first
    assert store.reads == ["a"]


def test_concurrent_loads_of_one_digest_are_one_read():
    store = FakeStore()
    store.gate.clear()
    with loader_of(store) as loader:
        futures = [loader.load(ref("a")) for _ in range(5)]
        other = loader.load(ref("b"))
        assert not futures[0].cancel()
        wait_until(lambda: sorted(store.reads) == ["a", "b"])
        store.gate.set()
        assert {future.result(SOON_S).digest for future in futures} == {"a"}
        assert other.result(SOON_S).digest == "b"
    assert sorted(store.reads) == ["a", "b"]


def test_a_store_that_fails_twice_is_asked_three_times():
    store = FakeStore(lambda read: StoreUnavailableError("away") if read < 2 else None)
    with loader_of(store, retries=3) as loader:
        assert loader.load(ref("a")).result(SOON_S).digest == "a"
    assert len(store.reads) == 3


def test_the_pauses_between_tries_grow(monkeypatch):
    pauses: list[float] = []
    store = FakeStore(lambda read: StoreUnavailableError("away"))
    with loader_of(store, retries=3, backoff_s=1.0) as loader:
        monkeypatch.setattr(loader._closing, "wait", pauses.append)
        with pytest.raises(StoreUnavailableError, match="away"):
            loader.load(ref("a")).result(SOON_S)
    assert [1 <= 2 * pause / 2**i <= 2 for i, pause in enumerate(pauses)] == [True] * 3


def test_a_store_that_stays_away_fails_the_load_and_the_next_one_tries_again():
    store = FakeStore(lambda read: StoreUnavailableError("away") if read < 3 else None)
    with loader_of(store, retries=2, unavailable_ttl_s=0.2) as loader:
        for _ in range(2):
            with pytest.raises(StoreUnavailableError, match="away"):
                loader.load(ref("a")).result(SOON_S)
        assert len(store.reads) == 3
        time.sleep(0.25)
        assert loader.load(ref("a")).result(SOON_S).digest == "a"
    assert len(store.reads) == 4


@pytest.mark.parametrize(
    "error", [AdapterNotFoundError("gone"), AdapterChangedError("changed"), ValueError("bug")]
)
def test_other_errors_are_neither_retried_nor_remembered(error):
    store = FakeStore(lambda read: error if read == 0 else None)
    with loader_of(store) as loader:
        with pytest.raises(type(error), match=str(error)):
            loader.load(ref("a")).result(SOON_S)
        assert len(store.reads) == 1
        assert loader.load(ref("a")).result(SOON_S).digest == "a"


def test_an_invalid_adapter_is_not_read_again_for_a_while():
    store = FakeStore(lambda read: AdapterInvalidError("NaN", file="f") if read == 0 else None)
    with loader_of(store, negative_ttl_s=0.2) as loader:
        first = loader.load(ref("a")).exception(SOON_S)
        second, third = (loader.load(ref("a")).exception(0) for _ in range(2))
        assert len(store.reads) == 1
        assert isinstance(first, AdapterInvalidError)
        assert isinstance(second, AdapterInvalidError)
        assert (str(second), second.metadata) == ("NaN", {"file": "f"})
        assert second is not third, "a shared exception would grow its traceback"
        assert loader.load(ref("b")).result(SOON_S).digest == "b", "another digest is another adapter"
        time.sleep(0.25)
        assert loader.load(ref("a")).result(SOON_S).digest == "a"


def test_a_failure_can_be_forgotten():
    store = FakeStore(lambda read: AdapterInvalidError("NaN") if read == 0 else None)
    with loader_of(store, negative_ttl_s=1000) as loader:
        assert loader.load(ref("a")).exception(SOON_S) is not None
        loader.forget_failure("a")
        assert loader.load(ref("a")).result(SOON_S).digest == "a"


def test_an_adapter_over_the_caches_budget_fails_and_is_remembered():
    store = FakeStore()
    with loader_of(store, budget=9) as loader:
        for _ in range(2):
            with pytest.raises(CapacityError, match="--host-cache-bytes"):
                loader.load(ref("a")).result(SOON_S)
    assert len(store.reads) == 1


def test_a_cache_full_of_leases_does_not_fail_a_load():
    store = FakeStore()
    with loader_of(store, budget=10) as loader:
        loader.load(ref("a")).result(SOON_S)
        with loader._cache.lease("a"):
            assert loader.load(ref("b")).result(SOON_S).digest == "b"
            assert "b" not in loader._cache


def test_a_read_that_hangs_fails_at_the_deadline_and_fills_the_cache_later():
    store = FakeStore()
    store.gate.clear()
    with loader_of(store, deadline_s=0.1, workers=1) as loader:
        reading, waiting = loader.load(ref("a")), loader.load(ref("b"))
        for future in (reading, waiting):
            with pytest.raises(StoreUnavailableError, match=r"acme/support@1 was not loaded within 0.1 s"):
                future.result(SOON_S)
        store.gate.set()
        wait_until(lambda: loader.load(ref("a")).exception(SOON_S) is None)
        assert store.reads.count("a") <= 2
        assert loader.load(ref("c")).result(SOON_S).digest == "c"


def test_threads_that_hang_are_replaced_until_they_come_back():
    hung = threading.Event()

    class HangingStore(FakeStore):
        def read(self, ref: AdapterRef) -> RawCheckpoint:
            assert not ref.digest.startswith("hung") or hung.wait(SOON_S)
            return super().read(ref)

    store = HangingStore()
    with loader_of(store, deadline_s=0.1, workers=2) as loader:
        for digest in ("hung a", "hung b"):
            assert isinstance(loader.load(ref(digest)).exception(SOON_S), StoreUnavailableError)
        wait_until(lambda: loader.load(ref("c")).exception(SOON_S) is None)
        assert len(loader._workers) == 4
        hung.set()
        wait_until(lambda: len(loader._workers) == 2)
        assert loader.load(ref("d")).exception(SOON_S) is None


def test_a_store_that_refuses_is_not_asked_again_for_a_while():
    store = FakeStore(lambda read: StoreDeniedError("permission denied"))
    with loader_of(store, retries=3, unavailable_ttl_s=0.0) as loader:
        for _ in range(3):
            error = loader.load(ref("a")).exception(SOON_S)
            assert (type(error), str(error)) == (StoreDeniedError, "permission denied")
    assert len(store.reads) == 1


def test_retries_end_at_the_deadline():
    store = FakeStore(lambda read: StoreUnavailableError("away"))
    with loader_of(store, deadline_s=0.1, retries=10**6, backoff_s=0.02) as loader:
        with pytest.raises(StoreUnavailableError, match="not loaded within"):
            loader.load(ref("a")).result(SOON_S)
        time.sleep(0.3)  # the pause that the deadline fell into
        reads = len(store.reads)
        time.sleep(0.3)
        assert len(store.reads) == reads


def test_closing_fails_what_is_unanswered_and_does_not_wait_for_a_hung_read(monkeypatch):
    monkeypatch.setattr("hotswap_server.adapters.loader._CLOSE_TIMEOUT_S", 0.1)
    store = FakeStore()
    store.gate.clear()
    with loader_of(store, workers=1) as loader:
        futures = [loader.load(ref("a")), loader.load(ref("b"))]
        begin = time.monotonic()
        loader.close()
        assert time.monotonic() - begin < SOON_S / 2
        for future in futures:
            assert isinstance(future.exception(0), DrainingError)
        assert isinstance(loader.load(ref("a")).exception(0), DrainingError)
        loader.close()
    wait_until(lambda: not any(thread.is_alive() for thread in loader._workers))
    assert "b" not in store.reads


def test_closing_ends_a_pause_between_tries():
    store = FakeStore(lambda read: StoreUnavailableError("away"))
    with loader_of(store, backoff_s=100.0) as loader:
        future = loader.load(ref("a"))
        wait_until(lambda: store.reads == ["a"])
        loader.close()
        assert isinstance(future.exception(0), DrainingError)
        assert not any(thread.is_alive() for thread in (*loader._workers, loader._watcher))


def test_callbacks_run_on_a_loader_thread_and_may_load():
    store = FakeStore()
    store.gate.clear()
    names: list[str] = []
    chained: list[object] = []
    with loader_of(store) as loader:
        future = loader.load(ref("a"))
        future.add_done_callback(lambda _: names.append(threading.current_thread().name))
        future.add_done_callback(lambda _: chained.append(loader.load(ref("b"))))
        store.gate.set()
        wait_until(lambda: len(chained) == 1)
        assert loader.load(ref("b")).result(SOON_S).digest == "b"
    assert names[0].startswith("adapter-loader-")
