import numpy as np
import pytest
import torch
from hotswap_server.engine.batch import token_slots
from hotswap_server.kernels import select_kernels
from hotswap_server.kernels.interface import GroupedLora, Segment

NAMES = ("native", "onednn", "reference")
CPU = torch.device("cpu")
IN_FEATURES = 50
WIDTHS = (40, 20, 33)
MAX_RANK = 70
# By slot, the rank for each member; 0 leaves the member alone.
RANKS = ((8, 8, 8), (1, 0, 64), (0, 0, 0), (0, 70, 3), (16, 33, 0))


@pytest.fixture(scope="module")
def bank() -> GroupedLora:
    """Rows beyond a rank are NaN: reading one shows."""
    generator = torch.Generator().manual_seed(0)
    a = torch.full((len(RANKS), len(WIDTHS), MAX_RANK, IN_FEATURES), torch.nan)
    b = tuple(torch.full((len(RANKS), MAX_RANK, width), torch.nan) for width in WIDTHS)
    for slot, ranks in enumerate(RANKS):
        for member, rank in enumerate(ranks):
            a[slot, member, :rank] = torch.randn(rank, IN_FEATURES, generator=generator) * 0.3
            b[member][slot, :rank] = torch.randn(rank, WIDTHS[member], generator=generator) * 0.3
    offsets = tuple(sum(WIDTHS[:member]) for member in range(len(WIDTHS)))
    return GroupedLora(a, b, torch.tensor(RANKS, dtype=torch.int32), WIDTHS, offsets)


def expected_update(x: torch.Tensor, bank: GroupedLora, index: list[int]) -> torch.Tensor:
    update = torch.zeros(len(x), sum(WIDTHS), dtype=torch.float64)
    for token, slot in enumerate(index):
        for member, rank in enumerate(RANKS[slot] if slot >= 0 else ()):
            a, b = bank.a[slot, member, :rank].double(), bank.b[member][slot, :rank].double()
            columns = slice(bank.offsets[member], bank.offsets[member] + WIDTHS[member])
            update[token, columns] = x[token].double() @ a.t() @ b
    return update


CASES = {
    "one_token": [3],
    "one_token_without": [-1],
    "decodes": [0, 1, 2, 3, 4, -1, 0, 3, -1, 4],
    "nobody": [-1] * 20,
    "short_runs": [0] * 3 + [1] * 15 + [-1] * 2 + [4] * 15,
    "long_run": [3] * 16,
    "long_runs_between": [-1, 0, *[1] * 40, 4, *[3] * 17, *[-1] * 30, *[2] * 20, *[0] * 16],
    "the_same_adapter_again": [0] * 20 + [-1] + [0] * 2 + [1] + [0] * 30,
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("threads", [1, 2])
def test_updates_equal_the_double_precision_product(name, case, threads, bank):
    kernels = select_kernels(CPU, torch.float32, name)
    index = CASES[case]
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(len(index), IN_FEATURES, generator=generator)
    out = torch.randn(len(index), sum(WIDTHS), generator=generator)
    expected = out.double() + expected_update(x, bank, index)
    untouched = expected == out.double()
    before, threads_before = out.clone(), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        kernels.lora(x, bank, token_slots(np.array(index, np.int32), CPU), out)
    finally:
        torch.set_num_threads(threads_before)
    torch.testing.assert_close(out.double(), expected, atol=1e-4, rtol=1e-5)
    # A member or a token without an adapter keeps every bit.
    assert torch.equal(out[untouched], before[untouched])


def test_a_token_is_the_same_in_every_batch_of_single_tokens(bank):
    kernels = select_kernels(CPU, torch.float32, "native")
    x = torch.randn(9, IN_FEATURES)
    index = np.array([0, 4, 3, 1, -1, 0, 3, 2, 1], np.int32)
    together = torch.zeros(9, sum(WIDTHS))
    kernels.lora(x, bank, token_slots(index, CPU), together)
    for token in range(9):
        alone = torch.zeros(1, sum(WIDTHS))
        kernels.lora(x[token : token + 1], bank, token_slots(index[token : token + 1], CPU), alone)
        assert torch.equal(alone[0], together[token])


@pytest.mark.parametrize("name", NAMES)
def test_ranks_over_a_thousand(name):
    rank = 1500
    a, b = torch.randn(1, 1, rank, 8) * 0.1, torch.randn(1, rank, 8) * 0.1
    bank = GroupedLora(a, (b,), torch.tensor([[rank]], dtype=torch.int32), (8,), (0,))
    x, out = torch.randn(2, 8), torch.zeros(2, 8)
    kernels = select_kernels(CPU, torch.float32, name)
    kernels.lora(x, bank, token_slots(np.zeros(2, np.int32), CPU), out)
    torch.testing.assert_close(out, x @ a[0, 0].t() @ b[0], atol=1e-4, rtol=1e-4)


def test_long_runs_are_split_off():
    slots = token_slots(np.array([1, 2, *[3] * 16, *[-1] * 20, 3, *[0] * 17], np.int32), CPU)
    assert slots.long == (Segment(2, 18, 3), Segment(39, 56, 0))
    assert slots.rest is not None
    assert slots.rest.tolist() == [1, 2, *[-1] * 36, 3, *[-1] * 17]
    assert slots.index.tolist() == [1, 2, *[3] * 16, *[-1] * 20, 3, *[0] * 17]
    assert [(run.start, run.stop, run.slot) for run in slots.segments] == [
        *[(0, 1, 1), (1, 2, 2), (2, 18, 3)],
        *[(38, 39, 3), (39, 56, 0)],
    ]
    assert token_slots(np.array([2] * 16, np.int32), CPU).rest is None
    assert token_slots(np.array([-1] * 30, np.int32), CPU).rest is None
