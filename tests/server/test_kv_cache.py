import pytest
import torch
from hotswap_server.engine.attention import AttentionSite
from hotswap_server.engine.kv_cache import PagedKVCache, PagePool
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

SITES = (AttentionSite(0, 4, 2, 8), AttentionSite(1, 4, 1, 16))


def test_shapes_and_bytes():
    cache = PagedKVCache(SITES, num_pages=5, page_size=4, dtype=torch.float16, device=torch.device("cpu"))
    assert [tuple(layer.shape) for layer in cache.keys] == [(5, 2, 4, 8), (5, 1, 4, 16)]
    assert [tuple(layer.shape) for layer in cache.values] == [(5, 2, 4, 8), (5, 1, 4, 16)]
    total = sum(layer.nbytes for layer in (*cache.keys, *cache.values))
    assert PagedKVCache.bytes_per_page(SITES, 4, torch.float16) * 5 == total


@pytest.mark.parametrize(("tokens", "pages"), [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
def test_pages_for_tokens(tokens, pages):
    cache = PagedKVCache((), num_pages=1, page_size=4, dtype=torch.float32, device=torch.device("cpu"))
    assert cache.pages_for(tokens) == pages


def test_too_few_pages_take_none():
    pool = PagePool(3)
    assert pool.allocate(4) is None
    assert pool.num_free == 3
    assert pool.allocate(0) == []
    assert sorted(pool.allocate(3) or []) == [0, 1, 2]
    assert pool.allocate(1) is None


class PoolMachine(RuleBasedStateMachine):
    """A pool beside a plain list of who holds what."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(12)
        self.holders: list[list[int]] = []

    @rule(count=st.integers(0, 6))
    def allocate(self, count: int) -> None:
        held = {page for holder in self.holders for page in holder}
        pages = self.pool.allocate(count)
        if count > 12 - len(held):
            assert pages is None
        else:
            assert pages is not None
            assert len(set(pages)) == count
            assert held.isdisjoint(pages)
            self.holders.append(pages)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        holder = data.draw(st.sampled_from(self.holders))
        self.pool.share(holder)
        self.holders.append(list(holder))

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.holders) - 1))
        self.pool.release(self.holders.pop(index))

    @invariant()
    def counts_agree(self) -> None:
        held = {page for holder in self.holders for page in holder}
        assert self.pool.num_used == len(held)
        assert self.pool.num_free == 12 - len(held)


PoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestPool = PoolMachine.TestCase
