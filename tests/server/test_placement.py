"""The way to a slot in random order, with a loader and a copier that do as they are told."""

from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from hotswap_server.adapters.host_cache import HostCache
from hotswap_server.adapters.placement import Placement
from hotswap_server.adapters.residency import NullAdapterObserver
from hotswap_server.adapters.slots import PATIENCE, State
from hotswap_server.core import AdapterRef
from hotswap_server.errors import AdapterInvalidError
from hypothesis import given, settings
from hypothesis import strategies as st

SLOTS = 2
REFS = [AdapterRef(f"acme/{n}", 1, f"digest {n}", "lora") for n in range(5)]
BAD = AdapterRef("acme/bad", 1, "digest bad", "lora")


@dataclass(frozen=True)
class Adapter:
    digest: str
    nbytes: int = 10
    num_parameters: int = 1
    method: str = "lora"
    details: dict[str, str] = field(default_factory=dict)


class FakeBank:
    """Checks that a slot is filled only when nobody has it."""

    num_slots = SLOTS

    def __init__(self) -> None:
        self.content: dict[int, str] = {}

    def put(self, slot: int, adapter: Adapter) -> None:
        assert slot not in self.content, "it was not cleared"
        self.content[slot] = adapter.digest

    def clear(self, slot: int) -> None:
        self.content.pop(slot, None)


class FakeLoader:
    def __init__(self, cache: HostCache[Adapter]) -> None:
        self.cache = cache
        self.jobs: dict[str, tuple[AdapterRef, Future[Adapter]]] = {}

    def load(self, ref: AdapterRef) -> Future[Adapter]:
        if ref.digest not in self.jobs:
            self.jobs[ref.digest] = (ref, Future())
        return self.jobs[ref.digest][1]

    def forget_failure(self, digest: str) -> None: ...

    def finish(self) -> None:
        """The oldest job."""
        ref, future = self.jobs.pop(next(iter(self.jobs)))
        if ref == BAD:
            future.set_exception(AdapterInvalidError("bad"))
        else:
            self.cache.put(ref.digest, Adapter(ref.digest), 10)
            future.set_result(Adapter(ref.digest))


class Simulation:
    """`waiting` and `running` are requests by their adapter."""

    def __init__(self, host_bytes: int = 40) -> None:
        self.cache: HostCache[Any] = HostCache(host_bytes)
        self.loader = FakeLoader(self.cache)
        self.bank = FakeBank()
        self.placement = Placement(
            {"lora": self.bank},  # type: ignore[dict-item]
            self.cache,
            self.loader,  # type: ignore[arg-type]
            NullAdapterObserver(),
            lambda: None,
        )
        self.copies: list[Callable[[], None]] = []
        self.placement._submit = lambda call, *args: self.copies.append(lambda: call(*args))  # type: ignore[method-assign]
        self.waiting: list[AdapterRef] = []
        self.running: list[tuple[AdapterRef, int]] = []
        self.failed = 0

    def arrive(self, ref: AdapterRef) -> None:
        self.placement.expect(ref)
        self.waiting.append(ref)

    def poll(self) -> None:
        """What the scheduler does in a step."""
        for ref in list(self.waiting):
            try:
                slot = self.placement.try_acquire(ref)
            except AdapterInvalidError:
                self.failed += 1
                self.waiting.remove(ref)
                self.placement.forget(ref)
                continue
            if slot is not None:
                assert self.bank.content[slot] == ref.digest
                self.waiting.remove(ref)
                self.running.append((ref, slot))

    def end(self, index: int) -> None:
        if self.running:
            self.placement.release(self.running.pop(index % len(self.running))[0])

    def leave(self, index: int) -> None:
        if self.waiting:
            self.placement.forget(self.waiting.pop(index % len(self.waiting)))

    def load(self) -> None:
        if self.loader.jobs:
            self.loader.finish()

    def copy(self) -> None:
        if self.copies:
            self.copies.pop(0)()

    def toggle_pin(self, ref: AdapterRef) -> None:
        placement = self.placement
        with placement.acting():
            resident = placement.residents.get(ref)
            if resident is not None and resident.pinned:
                placement.unpin(resident)
            elif sum(other.kept for other in placement.residents.values()) + 1 < SLOTS:
                placement.bring(ref, pinned=True)

    def unload(self, ref: AdapterRef) -> None:
        with self.placement.acting():
            for resident in self.placement.matching(ref.name, None):
                if not resident.kept:
                    resident.leaving = True
                    resident.on_left.append(Future())
                    if resident.users == 0 and resident.state not in (State.FETCHING, State.PLACING):
                        self.placement.leave(resident)
                        self.placement.advance(ref.method)

    def check(self) -> None:
        residents = list(self.placement.residents.values())
        slots = [resident.slot for resident in residents if resident.slot is not None]
        assert len(set(slots)) == len(slots) <= SLOTS
        users = Counter(ref for ref, _ in self.running)
        assert {r.ref: r.users for r in residents if r.users} == dict(users)
        for ref, slot in self.running:
            assert self.bank.content[slot] == ref.digest, "evicted under a request"
        assert Counter(self.waiting) == +self.placement._wanted
        assert set(self.waiting) <= set(self.placement.residents)
        held = sum(r.adapter.nbytes for r in residents if r.adapter is not None)
        assert held == self.placement._held_bytes
        assert self.cache.stats.leased_bytes <= held

    def settle(self) -> int:
        """Serve everybody, each for a step; the number of steps."""
        for steps in range(40 * PATIENCE):
            if not (self.waiting or self.running or self.copies or self.loader.jobs):
                return steps
            self.load()
            self.copy()
            self.poll()
            self.check()
            self.end(0)
        raise AssertionError(f"never served: {self.waiting}")


ACTIONS = st.one_of(
    st.tuples(st.sampled_from(["arrive", "toggle_pin", "unload"]), st.sampled_from(REFS)),
    st.tuples(st.just("arrive"), st.sampled_from([*REFS, BAD])),
    st.tuples(st.sampled_from(["end", "leave"]), st.integers(0, 10)),
    st.tuples(st.sampled_from(["poll", "load", "copy"]), st.none()),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(ACTIONS, max_size=60))
def test_slots_are_never_shared_and_everybody_is_served(actions):
    simulation = Simulation()
    for action, argument in actions:
        method = getattr(simulation, action)
        method() if argument is None else method(argument)
        simulation.check()
    simulation.settle()
    residents = simulation.placement.residents.values()
    assert all(resident.state is State.READY for resident in residents)
    assert sum(resident.pinned for resident in residents) < SLOTS
    assert simulation.cache.stats.leased_bytes == 0
    assert simulation.bank.content.keys() == {resident.slot for resident in residents}
    simulation.placement.close()


def test_slots_are_given_in_the_order_in_which_adapters_came_to_host_memory():
    simulation = Simulation()
    for ref in REFS[:2]:
        simulation.arrive(ref)
    simulation.load()
    simulation.load()
    for _ in range(4):
        simulation.copy()
    simulation.poll()
    for ref in (REFS[4], REFS[2], REFS[3]):
        simulation.arrive(ref)
    served = []
    while simulation.waiting:
        simulation.load()
        simulation.copy()
        simulation.end(0)
        simulation.copy()
        simulation.poll()
        served += [ref for ref, _ in simulation.running if ref not in served]
    assert [ref for ref in served if ref in REFS[2:]] == [REFS[4], REFS[2], REFS[3]]
    simulation.placement.close()


def test_an_adapter_is_not_evicted_before_the_request_that_it_was_brought_for():
    """Nor by another one that waits, as long as that one is not asked for again and again in vain."""
    simulation = Simulation()
    for ref in REFS[:4]:
        simulation.arrive(ref)
    for _ in range(20):
        simulation.load()
        simulation.copy()
    assert not simulation.copies
    assert set(simulation.bank.content.values()) == {"digest 0", "digest 1"}
    simulation.poll()
    assert [ref for ref, _ in simulation.running] == REFS[:2]
    simulation.settle()
    simulation.placement.close()
