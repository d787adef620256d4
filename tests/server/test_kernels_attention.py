from collections.abc import Sequence

import pytest
import torch
from hotswap_server.kernels import AttentionLayout, select_kernels

NAMES = ("native", "onednn", "reference")
PAGE = 16
# Sequences as (tokens in the cache before, new tokens): decodes first, as the scheduler orders them.
DECODE = ((0, 1), (14, 1), (15, 1), (16, 1), (31, 1), (32, 1), (100, 1))
PREFILL = ((0, 2), (0, 16), (0, 17), (5, 12), (16, 16), (33, 40), (0, 130))


def laid_out(
    sequences: Sequence[tuple[int, int]], *, heads: int, kv_heads: int, head_dim: int, page_size: int = PAGE
):
    """Query, whole keys and values per sequence, caches with them in shuffled pages, and the layout."""
    generator = torch.Generator().manual_seed(head_dim)
    lengths = [past + new for past, new in sequences]
    pages_each = [-(-length // page_size) for length in lengths]
    total = sum(pages_each) + 3
    # Whatever is in the rest of a page must not matter, not even NaN.
    key_cache = torch.full((total, kv_heads, page_size, head_dim), torch.nan)
    value_cache = torch.full_like(key_cache, torch.nan)
    shuffled = iter(torch.randperm(total, generator=generator).tolist())
    table = torch.zeros(len(sequences), max(pages_each), dtype=torch.int32)
    keys, values, token_pages, token_offsets, starts = [], [], [], [], [0]
    for row, ((past, new), pages) in enumerate(zip(sequences, pages_each, strict=True)):
        own = [next(shuffled) for _ in range(pages)]
        table[row, :pages] = torch.tensor(own)
        key = torch.randn(past + new, kv_heads, head_dim, generator=generator)
        value = torch.randn(past + new, kv_heads, head_dim, generator=generator)
        for position in range(past):
            page, offset = own[position // page_size], position % page_size
            key_cache[page, :, offset], value_cache[page, :, offset] = key[position], value[position]
        for position in range(past, past + new):
            token_pages.append(own[position // page_size])
            token_offsets.append(position % page_size)
        keys.append(key)
        values.append(value)
        starts.append(starts[-1] + new)
    layout = AttentionLayout(
        num_decode=sum(new == 1 for _, new in sequences),
        query_starts=starts,
        context_lengths=lengths,
        context=torch.tensor(lengths, dtype=torch.int32),
        block_table=table,
        token_pages=torch.tensor(token_pages),
        token_offsets=torch.tensor(token_offsets),
    )
    query = torch.randn(starts[-1], heads, head_dim, generator=generator)
    return query, keys, values, key_cache, value_cache, layout


def attend_naively(query, keys, values, sequences, *, scale, window, softcap) -> torch.Tensor:
    """Token by token and head by head, in double precision."""
    heads = query.shape[1]
    out, row = torch.empty_like(query, dtype=torch.float64), 0
    for (past, new), key, value in zip(sequences, keys, values, strict=True):
        group = heads // key.shape[1]
        for position in range(past, past + new):
            first = 0 if window is None else max(0, position - window + 1)
            for head in range(heads):
                k = key[first : position + 1, head // group].double()
                v = value[first : position + 1, head // group].double()
                scores = k @ query[row, head].double() * scale
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                out[row, head] = scores.softmax(-1) @ v
            row += 1
    return out


def check(
    name: str, sequences: Sequence[tuple[int, int]], *, window=None, softcap=None, page_size=PAGE, **shape
):
    kernels = select_kernels(torch.device("cpu"), torch.float32, name)
    query, keys, values, key_cache, value_cache, layout = laid_out(sequences, page_size=page_size, **shape)
    new_keys = torch.cat([key[past:] for (past, _), key in zip(sequences, keys, strict=True)])
    new_values = torch.cat([value[past:] for (past, _), value in zip(sequences, values, strict=True)])
    # As the model gives them: views of one projection's output, rows apart.
    stacked = torch.cat([query.flatten(1), new_keys.flatten(1), new_values.flatten(1)], dim=1)
    q, k, v = stacked.split([query[0].numel(), new_keys[0].numel(), new_values[0].numel()], dim=1)
    kernels.write_cache(
        k.unflatten(1, new_keys.shape[1:]),
        v.unflatten(1, new_values.shape[1:]),
        key_cache,
        value_cache,
        layout,
    )
    scale = shape["head_dim"] ** -0.5 * 1.5
    got = kernels.paged_attention(
        q.unflatten(1, query.shape[1:]),
        key_cache,
        value_cache,
        layout,
        scale=scale,
        window=window,
        softcap=softcap,
    )
    expected = attend_naively(query, keys, values, sequences, scale=scale, window=window, softcap=softcap)
    torch.testing.assert_close(got.double(), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_head_sizes(name, head_dim):
    check(name, [*DECODE, *PREFILL[:5]], heads=4, kv_heads=2, head_dim=head_dim)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 4), (8, 2), (9, 3), (7, 1)])
def test_grouped_queries(name, heads, kv_heads):
    check(name, [*DECODE, *PREFILL[:5]], heads=heads, kv_heads=kv_heads, head_dim=16)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("window", [None, 1, 7, 16, 17, 32, 1000])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_windows_and_softcaps(name, window, softcap):
    check(name, [*DECODE, *PREFILL], heads=4, kv_heads=2, head_dim=8, window=window, softcap=softcap)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("page_size", [1, 2, 8, 32])
def test_page_sizes(name, page_size):
    check(
        name,
        [*DECODE, *PREFILL],
        heads=4,
        kv_heads=2,
        head_dim=8,
        page_size=page_size,
        window=20,
        softcap=3.0,
    )


@pytest.mark.parametrize("name", NAMES)
def test_only_decodes_and_only_prompts(name):
    check(name, DECODE, heads=4, kv_heads=2, head_dim=32)
    check(name, PREFILL, heads=4, kv_heads=2, head_dim=32)


def test_threads_do_not_change_a_bit():
    kernels = select_kernels(torch.device("cpu"), torch.float32, "native")
    query, keys, values, key_cache, value_cache, layout = laid_out(DECODE, heads=4, kv_heads=2, head_dim=64)
    new = [tuple(t[-1] for t in kv) for kv in (keys, values)]
    kernels.write_cache(torch.stack(new[0]), torch.stack(new[1]), key_cache, value_cache, layout)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(
                kernels.paged_attention(
                    query, key_cache, value_cache, layout, scale=0.1, window=None, softcap=None
                )
            )
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


@pytest.mark.parametrize("name", NAMES)
def test_write_cache_touches_only_the_given_places(name):
    kernels = select_kernels(torch.device("cpu"), torch.float32, name)
    _, keys, values, key_cache, value_cache, layout = laid_out(
        [(3, 1), (15, 20)], heads=2, kv_heads=2, head_dim=8
    )
    before = key_cache.clone(), value_cache.clone()
    # Transposed, as after the rotary embedding.
    new_keys = torch.cat([keys[0][3:], keys[1][15:]]).transpose(0, 1).contiguous().transpose(0, 1)
    new_values = torch.cat([values[0][3:], values[1][15:]])
    kernels.write_cache(new_keys, new_values, key_cache, value_cache, layout)
    for cache, old, new in ((key_cache, before[0], new_keys), (value_cache, before[1], new_values)):
        for token, (page, offset) in enumerate(
            zip(layout.token_pages.tolist(), layout.token_offsets.tolist(), strict=True)
        ):
            assert torch.equal(cache[page, :, offset], new[token])
            old[page, :, offset] = new[token]
        torch.testing.assert_close(cache, old, rtol=0, atol=0, equal_nan=True)
