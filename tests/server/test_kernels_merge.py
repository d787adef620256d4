"""Merged weights: the dense form against its definition, packed panels against the dense form."""

import pytest
import torch
from hotswap_server.kernels import LowRankUpdate, select_kernels
from hotswap_server.kernels.reference import merged_weight

CPU = torch.device("cpu")


def update(rank, out_features, in_features, *, scaled=False):
    scale = torch.rand(out_features) - 0.5 if scaled else None
    return LowRankUpdate(torch.randn(rank, in_features), torch.randn(rank, out_features), scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scaled", [False, True])
def test_the_dense_weight_is_that_of_the_formula(dtype, scaled):
    torch.manual_seed(0)
    weight, change = torch.randn(5000, 7).to(dtype), update(3, 5000, 7, scaled=scaled)
    expected = weight.double() + change.b.double().t() @ change.a.double()
    if change.scale is not None:
        expected *= change.scale.double()[:, None]
    got = merged_weight(weight, change)
    assert got.dtype is dtype
    rounding = {torch.float32: 1e-6, torch.bfloat16: 2**-8}[dtype]
    torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=rounding)


@pytest.mark.parametrize("kernels", ["native", "onednn"])
@pytest.mark.parametrize(
    ("in_features", "widths", "ranks"),
    [
        (64, (64,), (4,)),
        (37, (96, 32, 32), (1, 9, 33)),
        (12, (5, 7, 3, 90), (2, 3, 4, 5)),  # several in one panel
        (16, (33, 40, 17), (0, 3, 0)),
        (16, (70, 10, 30), (3, 0, 2)),
        (3, (2,), (1,)),
    ],
)
def test_packed_weights_are_merged_as_dense_ones(kernels, in_features, widths, ranks):
    torch.manual_seed(0)
    fast, reference = (select_kernels(CPU, torch.float32, name) for name in (kernels, "reference"))
    weight, bias, new_bias = torch.randn(sum(widths), in_features), *torch.randn(2, sum(widths))
    starts = [sum(widths[:index]) for index in range(len(widths))]
    updates = [
        (start, update(rank, width, in_features, scaled=rank % 2 == 1))
        for start, width, rank in zip(starts, widths, ranks, strict=True)
        if rank
    ]
    packed = fast.projection(weight, bias)
    merged = fast.merged(packed, updates, new_bias)
    expected = reference.merged(reference.projection(weight, bias), updates, new_bias)
    torch.testing.assert_close(merged.weight(), expected.weight(), atol=1e-5, rtol=1e-5)
    x = torch.randn(5, in_features)
    torch.testing.assert_close(merged(x), expected(x), atol=1e-4, rtol=1e-4)
    assert torch.equal(packed.weight(), weight)
    untouched = torch.ones(sum(widths), dtype=torch.bool)
    for start, change in updates:
        untouched[start : start + change.b.shape[1]] = False
    assert torch.equal(merged.weight()[untouched], weight[untouched])
