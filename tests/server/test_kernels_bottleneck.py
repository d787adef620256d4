import numpy as np
import pytest
import torch
from hotswap_server.engine.batch import token_slots
from hotswap_server.kernels import Activation, BottleneckLayout, BottleneckTable, select_kernels
from torch.nn import functional as F

NAMES = ("native", "onednn", "reference")
CPU = torch.device("cpu")
HIDDEN = 50
MAX_SIZE = 70
# By slot: size, 0 leaves the tokens alone; activation; layout; residual.
SLOTS = (
    (8, Activation.RELU, BottleneckLayout.HOULSBY, 1),
    (1, Activation.GELU, BottleneckLayout.PFEIFFER, 1),
    (0, Activation.RELU, BottleneckLayout.HOULSBY, 1),
    (70, Activation.GELU_NEW, BottleneckLayout.PARALLEL, 1),
    (33, Activation.SILU, BottleneckLayout.HOULSBY, 0),
    (16, Activation.TANH, BottleneckLayout.PFEIFFER, 0),
    (5, Activation.SIGMOID, BottleneckLayout.PARALLEL, 1),
    (7, Activation.LEAKY_RELU, BottleneckLayout.PFEIFFER, 1),
)
FUNCTIONS = {
    Activation.RELU: F.relu,
    Activation.GELU: F.gelu,
    Activation.GELU_NEW: lambda z: 0.5 * z * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (z + 0.044715 * z**3))),
    Activation.SILU: lambda z: z * torch.sigmoid(z),
    Activation.TANH: torch.tanh,
    Activation.SIGMOID: torch.sigmoid,
    Activation.LEAKY_RELU: lambda z: torch.where(z > 0, z, 0.01 * z),
}


def make_table(slots=SLOTS, max_size: int = MAX_SIZE) -> BottleneckTable:
    """Rows beyond a size are NaN: reading one shows."""
    generator = torch.Generator().manual_seed(0)
    down, up = (torch.full((len(slots), max_size, HIDDEN), torch.nan) for _ in range(2))
    down_bias = torch.full((len(slots), max_size), torch.nan)
    for slot, (size, *_) in enumerate(slots):
        for tensor in (down, up, down_bias):
            shape = tensor[slot, :size].shape
            tensor[slot, :size] = torch.randn(shape, generator=generator) * 0.3
    columns = [torch.tensor(column, dtype=torch.int32) for column in zip(*slots, strict=True)]
    up_bias = torch.randn(len(slots), HIDDEN, generator=generator)
    return BottleneckTable(down, down_bias, up, up_bias, *columns)


@pytest.fixture(scope="module")
def table() -> BottleneckTable:
    return make_table()


def expected_result(x: torch.Tensor, stream: torch.Tensor, table, index: list[int]) -> torch.Tensor:
    result = x.double().clone()
    for token, slot in enumerate(index):
        size, activation, layout, residual = SLOTS[slot] if slot >= 0 else (0, 0, 0, 1)
        if size == 0:
            continue
        own, passing = x[token].double(), stream[token].double()
        given = {"HOULSBY": own, "PFEIFFER": own + passing, "PARALLEL": passing}[layout.name]
        hidden = table.down[slot, :size].double() @ given + table.down_bias[slot, :size].double()
        update = FUNCTIONS[activation](hidden) @ table.up[slot, :size].double() + table.up_bias[slot].double()
        result[token] = update + (own if residual else 0)
    return result


CASES = {
    "one_token": [3],
    "one_token_without": [-1],
    "one_of_each": [*range(len(SLOTS)), -1],
    "nobody": [-1] * 20,
    "pairs": [slot for slot in range(len(SLOTS)) for _ in range(2)],
    "short_runs": [0] * 3 + [1] * 15 + [-1] * 2 + [4] * 15,
    "long_run": [5] * 16,
    "long_runs_between": [-1, 0, *[1] * 40, 4, *[3] * 17, *[-1] * 30, *[2] * 20, *[4] * 16, *[7] * 20, 6],
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("threads", [1, 2])
def test_results_equal_the_double_precision_formula(name, case, threads, table):
    kernels, index = select_kernels(CPU, torch.float32, name), CASES[case]
    generator = torch.Generator().manual_seed(1)
    x, stream = torch.randn(2, len(index), HIDDEN, generator=generator)
    expected = expected_result(x, stream, table, index)
    untouched = [slot < 0 or SLOTS[slot][0] == 0 for slot in index]
    before, stream_before, threads_before = x.clone(), stream.clone(), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        kernels.bottleneck(stream, x, table, token_slots(np.array(index, np.int32), CPU))
    finally:
        torch.set_num_threads(threads_before)
    torch.testing.assert_close(x.double(), expected, atol=1e-4, rtol=1e-5)
    assert torch.equal(stream, stream_before)
    assert torch.equal(x[untouched], before[untouched]), "a token without an adapter keeps every bit"


def test_a_token_is_the_same_in_every_batch_of_single_tokens(table):
    kernels = select_kernels(CPU, torch.float32, "native")
    x, stream = torch.randn(2, 9, HIDDEN)
    index = np.array([0, 4, 3, 1, -1, 0, 5, 6, 7], np.int32)
    together = x.clone()
    kernels.bottleneck(stream, together, table, token_slots(index, CPU))
    for token in range(9):
        row, alone = slice(token, token + 1), x[token : token + 1].clone()
        kernels.bottleneck(stream[row], alone, table, token_slots(index[row], CPU))
        assert torch.equal(alone[0], together[token])


@pytest.mark.parametrize("name", NAMES)
def test_sizes_over_a_thousand(name):
    table = make_table(((1500, Activation.RELU, BottleneckLayout.HOULSBY, 1),), 1500)
    x, stream = torch.randn(2, 2, HIDDEN)
    expected = x + F.relu(F.linear(x, table.down[0], table.down_bias[0])) @ table.up[0] + table.up_bias[0]
    kernels = select_kernels(CPU, torch.float32, name)
    kernels.bottleneck(stream, x, table, token_slots(np.zeros(2, np.int32), CPU))
    torch.testing.assert_close(x, expected, atol=1e-3, rtol=1e-4)
