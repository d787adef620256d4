"""The Triton kernels against the torch reference in double precision."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from hotswap_server.engine.batch import token_slots
from hotswap_server.kernels import AttentionLayout, BottleneckTable, GroupedLora
from hotswap_server.kernels.interface import TokenSlots, slot_tiles
from hotswap_server.kernels.reference import ReferenceKernels
from hotswap_server.kernels.triton import TritonKernels

# Sequences as (tokens in the cache before, new tokens): decodes first, as the scheduler orders them.
DECODE = ((0, 1), (15, 1), (16, 1), (70, 1))
PROMPTS = ((0, 2), (5, 12), (33, 40), (0, 70))
# Relative to the largest value: operands are rounded to the type, sums are kept in float32.
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
CPU = torch.device("cpu")
CASES = {
    "one_token": [3],
    "one_token_without": [-1],
    "decodes": [0, 1, 2, 3, 4, -1, 0, 3, -1, 4],
    "shared": [-1, -1, *[1] * 5, *[4] * 16],
    "runs": [-1, 0, *[1] * 40, 4, *[3] * 17, *[-1] * 30, *[2] * 20, *[0] * 70],
}


@pytest.fixture(params=TOLERANCE, ids=["float32", "bfloat16", "float16"])
def dtype(request, device):
    if device.type == "cpu" and request.param != torch.float32:
        pytest.skip("the interpreter has numpy's types alone")
    return request.param


def assert_close(got: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    scale = expected.abs().max().clamp(min=1e-6)
    torch.testing.assert_close(
        got.cpu().double() / scale, expected.double() / scale, atol=TOLERANCE[dtype], rtol=0
    )


def paged(
    sequences: Sequence[tuple[int, int]], *, heads: int, kv_heads: int, head_dim: int, page_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, AttentionLayout]:
    """Query, new keys and values, caches with the old ones in shuffled pages, and the layout."""
    generator = torch.Generator().manual_seed(head_dim)
    lengths = [past + new for past, new in sequences]
    pages_each = [-(-length // page_size) for length in lengths]
    total = sum(pages_each) + 3
    shuffled = torch.randperm(total, generator=generator).tolist()
    caches = torch.randn(2, total, kv_heads, page_size, head_dim, generator=generator)
    table = torch.zeros(len(sequences), max(pages_each) + 2, dtype=torch.int32)
    pages, offsets, starts = [], [], [0]
    for row, ((past, new), count) in enumerate(zip(sequences, pages_each, strict=True)):
        own = [shuffled.pop() for _ in range(count)]
        table[row, :count] = torch.tensor(own)
        # Whatever is beyond a sequence must not matter.
        caches[:, own[-1], :, (past + new - 1) % page_size + 1 :] = torch.nan
        pages += [own[position // page_size] for position in range(past, past + new)]
        offsets += [position % page_size for position in range(past, past + new)]
        starts.append(starts[-1] + new)
    layout = AttentionLayout(
        num_decode=sum(new == 1 for _, new in sequences),
        query_starts=starts,
        context_lengths=lengths,
        context=torch.tensor(lengths, dtype=torch.int32),
        block_table=table,
        token_pages=torch.tensor(pages),
        token_offsets=torch.tensor(offsets),
    )
    query = torch.randn(starts[-1], heads, head_dim, generator=generator)
    key, value = torch.randn(2, starts[-1], kv_heads, head_dim, generator=generator)
    return query, key, value, caches[0], caches[1], layout


def moved(layout: AttentionLayout, device: torch.device) -> AttentionLayout:
    names = ("context", "block_table", "token_pages", "token_offsets")
    return dataclasses.replace(layout, **{name: getattr(layout, name).to(device) for name in names})


def check_attention(device, dtype, sequences, *, window=None, softcap=None, page_size=16, **shape) -> None:
    query, key, value, keys, values, layout = paged(sequences, page_size=page_size, **shape)
    there = moved(layout, device)
    mine = [tensor.to(device, dtype) for tensor in (query, key, value, keys, values)]
    rounded = [tensor.to(dtype).double() for tensor in (query, key, value, keys, values)]
    options = {"scale": shape["head_dim"] ** -0.5 * 1.5, "window": window, "softcap": softcap}
    kernels = TritonKernels()
    # As the model gives them: views of one projection's output, rows apart.
    stacked = torch.cat([tensor.flatten(1) for tensor in mine[:3]], dim=1)
    parts = stacked.split([tensor[0].numel() for tensor in mine[:3]], dim=1)
    q, k, v = (part.unflatten(1, t.shape[1:]) for part, t in zip(parts, mine[:3], strict=True))
    kernels.write_cache(k, v, mine[3], mine[4], there)
    got = kernels.paged_attention(q, mine[3], mine[4], there, **options)
    reference = ReferenceKernels()
    reference.write_cache(*rounded[1:], layout)
    for cache, expected in zip(mine[3:], rounded[3:], strict=True):
        torch.testing.assert_close(cache.cpu().double(), expected, atol=0, rtol=0, equal_nan=True)
    clean = [torch.nan_to_num(cache) for cache in rounded[3:]]
    assert_close(got, reference.paged_attention(rounded[0], *clean, layout, **options), dtype)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_head_sizes(device, dtype, head_dim):
    check_attention(device, dtype, [*DECODE, *PROMPTS[1:3]], heads=2, kv_heads=1, head_dim=head_dim)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (8, 2), (6, 3), (7, 1)])
def test_grouped_queries(device, dtype, heads, kv_heads):
    check_attention(device, dtype, [*DECODE, *PROMPTS[:2]], heads=heads, kv_heads=kv_heads, head_dim=16)


@pytest.mark.parametrize(("window", "softcap"), [(1, None), (17, 2.0), (None, 2.0), (1000, None)])
def test_windows_and_softcaps(device, dtype, window, softcap):
    check_attention(
        device, dtype, [*DECODE, *PROMPTS], heads=2, kv_heads=1, head_dim=16, window=window, softcap=softcap
    )


@pytest.mark.parametrize("page_size", [1, 8, 32])
def test_page_sizes(device, dtype, page_size):
    check_attention(
        device, dtype, [*DECODE, *PROMPTS[2:3]], heads=2, kv_heads=2, head_dim=16, page_size=page_size
    )


def test_many_sequences_are_not_split(device, dtype):
    check_attention(device, dtype, [(past, 1) for past in range(0, 96, 3)], heads=8, kv_heads=8, head_dim=16)


def test_padding_writes_nothing_and_gives_zeros(device):
    query, key, value, keys, values, layout = paged([(20, 1)], heads=2, kv_heads=1, head_dim=16, page_size=16)
    there = dataclasses.replace(
        moved(layout, device),
        num_decode=2,
        context=torch.tensor([21, 0], device=device),
        block_table=layout.block_table.repeat(2, 1).to(device),
        token_pages=torch.tensor([int(layout.token_pages[0]), -1], device=device),
        token_offsets=torch.tensor([int(layout.token_offsets[0]), 0], device=device),
    )
    caches = keys.to(device), values.to(device)
    kernels = TritonKernels()
    kernels.write_cache(key.repeat(2, 1, 1).to(device), value.repeat(2, 1, 1).to(device), *caches, there)
    ReferenceKernels().write_cache(key, value, keys, values, layout)
    torch.testing.assert_close(caches[0].cpu(), keys, atol=0, rtol=0, equal_nan=True)
    options = {"scale": 0.25, "window": None, "softcap": None}
    got = kernels.paged_attention(query.repeat(2, 1, 1).to(device), *caches, there, **options)
    assert not got[1].any()
    assert got[0].any()


WIDTHS, RANKS = (40, 20, 33), ((8, 8, 8), (1, 0, 64), (0, 0, 0), (0, 70, 3), (16, 33, 0))


def lora_bank(in_features: int) -> GroupedLora:
    """Rows beyond a rank are NaN: reading one shows."""
    generator = torch.Generator().manual_seed(0)
    a = torch.full((len(RANKS), len(WIDTHS), 70, in_features), torch.nan)
    b = tuple(torch.full((len(RANKS), 70, width), torch.nan) for width in WIDTHS)
    for slot, ranks in enumerate(RANKS):
        for member, rank in enumerate(ranks):
            a[slot, member, :rank] = torch.randn(rank, in_features, generator=generator) * 0.3
            b[member][slot, :rank] = torch.randn(rank, WIDTHS[member], generator=generator) * 0.3
    offsets = tuple(sum(WIDTHS[:member]) for member in range(len(WIDTHS)))
    return GroupedLora(a, b, torch.tensor(RANKS, dtype=torch.int32), WIDTHS, offsets)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("in_features", [50, 600])
@pytest.mark.parametrize("rows", [True, False])
def test_lora(device, dtype, case, in_features, rows):
    bank, index = lora_bank(in_features), np.array(CASES[case], np.int32)
    x = torch.randn(len(index), in_features).to(dtype)
    out = torch.randn(len(index), sum(WIDTHS)).to(dtype)
    mine = GroupedLora(
        bank.a.to(device, dtype),
        tuple(b.to(device, dtype) for b in bank.b),
        bank.ranks.to(device),
        WIDTHS,
        bank.offsets,
    )
    twin = GroupedLora(
        bank.a.to(dtype).double(),
        tuple(b.to(dtype).double() for b in bank.b),
        bank.ranks,
        WIDTHS,
        bank.offsets,
    )
    expected, got = out.double(), out.to(device)
    ReferenceKernels().lora(x.double(), twin, token_slots(index, CPU), expected)
    kernels = TritonKernels(row_tokens=10**6 if rows else 0)
    kernels.lora(x.to(device), mine, token_slots(index, device), got)
    assert_close(got, expected, dtype)
    untouched = expected == out.double()
    assert torch.equal(got.cpu()[untouched], out[untouched])


# By slot: size, activation, layout, residual.
SLOTS = (
    (8, 0, 0, 1),
    (1, 1, 1, 1),
    (0, 0, 0, 1),
    (70, 2, 2, 1),
    (33, 3, 0, 0),
    (16, 4, 1, 0),
    (5, 5, 2, 1),
    (7, 6, 1, 1),
)


HIDDEN = 300


def bottleneck_tables(
    device: torch.device, dtype: torch.dtype, generator: torch.Generator
) -> tuple[BottleneckTable, BottleneckTable]:
    """One on `device`, and its twin in double precision. Rows beyond a size are NaN: reading one shows."""
    largest = 70
    down, up = (torch.full((len(SLOTS), largest, HIDDEN), torch.nan) for _ in range(2))
    down_bias = torch.full((len(SLOTS), largest), torch.nan)
    for slot, (size, *_) in enumerate(SLOTS):
        for tensor in (down, up, down_bias):
            tensor[slot, :size] = torch.randn(tensor[slot, :size].shape, generator=generator) * 0.1
    weights = [down, down_bias, up, torch.randn(len(SLOTS), HIDDEN, generator=generator)]
    columns = [torch.tensor(column, dtype=torch.int32) for column in zip(*SLOTS, strict=True)]
    mine = BottleneckTable(*(w.to(device, dtype) for w in weights), *(c.to(device) for c in columns))
    return mine, BottleneckTable(*(w.to(dtype).double() for w in weights), *columns)


@pytest.mark.parametrize("case", [*CASES, "each"])
@pytest.mark.parametrize("rows", [True, False])
def test_bottleneck(device, dtype, case, rows):
    index = np.array([*range(len(SLOTS)), -1] if case == "each" else CASES[case], np.int32)
    generator = torch.Generator().manual_seed(0)
    mine, twin = bottleneck_tables(device, dtype, generator)
    x, stream = torch.randn(2, len(index), HIDDEN, generator=generator).to(dtype)
    expected, got = x.double(), x.to(device)
    ReferenceKernels().bottleneck(stream.double(), expected, twin, token_slots(index, CPU))
    kernels = TritonKernels(row_tokens=10**6 if rows else 0)
    kernels.bottleneck(stream.to(device), got, mine, token_slots(index, device))
    assert_close(got, expected, dtype)
    untouched = [slot < 0 or SLOTS[slot][0] == 0 for slot in index]
    assert torch.equal(got.cpu()[untouched], x[untouched])


@pytest.mark.parametrize("max_rank", [8, 40])
@pytest.mark.parametrize("case", ["apart", "loras", "bottlenecks"])
def test_bottlenecks_beside_the_wide_halves_of_loras(device, dtype, case, max_rank):
    loras = {"apart": [0, 1, 1, -1, 2, -1, -1, -1], "loras": [*range(3), 0, 1, 1], "bottlenecks": [-1] * 5}
    index = np.array(loras[case], np.int32)
    others = np.array([row % len(SLOTS) if slot < 0 else -1 for row, slot in enumerate(index)], np.int32)
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 3, max_rank, HIDDEN, generator=generator) * 0.3
    ranks = torch.tensor([[max_rank], [5], [0]], dtype=torch.int32)
    bank = GroupedLora(a[:, None].to(dtype), (b.to(dtype),), ranks, (HIDDEN,), (0,))
    mine = GroupedLora(bank.a.to(device), (bank.b[0].to(device),), ranks.to(device), (HIDDEN,), (0,))
    double = dataclasses.replace(bank, a=bank.a.double(), b=(bank.b[0].double(),))
    table, twin = bottleneck_tables(device, dtype, generator)
    weight, x, stream = (
        torch.randn(n, HIDDEN, generator=generator).to(dtype) for n in (HIDDEN, len(index), len(index))
    )
    kernels, reference = TritonKernels(), ReferenceKernels()
    plain = reference.projection(weight.double(), None)
    expected = plain(x.double())
    reference.lora(x.double(), double, token_slots(index, CPU), expected)
    reference.bottleneck(stream.double(), expected, twin, token_slots(others, CPU))
    product = kernels.projection(weight.to(device), None)
    found = kernels.project_and_shrink(product, x.to(device), mine, token_slots(index, device))
    assert found is not None
    got, pending = found
    assert_close(got, plain(x.double()), dtype)
    kernels.bottleneck_and_expand(stream.to(device), got, table, token_slots(others, device), pending)
    assert_close(got, expected, dtype)


def test_tiles_of_no_tokens_are_passed_over(device):
    index = np.array([0, 0, 1], np.int32)
    tiles, rows = slot_tiles(index)
    bank = lora_bank(50)
    mine = GroupedLora(
        bank.a.to(device), tuple(b.to(device) for b in bank.b), bank.ranks.to(device), WIDTHS, bank.offsets
    )
    padded = torch.from_numpy(np.concatenate([tiles, np.zeros_like(tiles)]))
    # As in a step's buffers: fields apart, tiles beside each other.
    apart = padded.t().contiguous().to(device).t()
    x, out = torch.randn(3, 50), torch.zeros(3, sum(WIDTHS))
    got = out.to(device)
    slots = TokenSlots(torch.from_numpy(index).to(device), None, (), frozenset({0, 1}), apart, rows)
    TritonKernels(row_tokens=0).lora(x.to(device), mine, slots, got)
    ReferenceKernels().lora(x, bank, token_slots(index, CPU), out)
    assert_close(got, out, torch.float32)


def test_tiles():
    tiles, rows = slot_tiles(np.array([-1, 2, 2, -1, 0, *[1] * 6], np.int32))
    assert (rows, tiles.tolist()) == (4, [[1, 2, 2], [4, 1, 0], [5, 4, 1], [9, 2, 1]])
    tiles, rows = slot_tiles(np.array([-1, 2, 2, -1, 0, *[1] * 16, *[-1] * 44], np.int32))
    assert (rows, tiles.tolist()) == (16, [[1, 2, 2], [4, 1, 0], [5, 16, 1]])
    tiles, rows = slot_tiles(np.array([-1, *[3] * 70, 0], np.int32))
    assert (rows, tiles.tolist()) == (64, [[1, 64, 3], [65, 6, 3], [71, 1, 0]])
    assert slot_tiles(np.array([-1, -1], np.int32))[0].shape == (0, 3)
