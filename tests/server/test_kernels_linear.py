import pytest
import torch
import torch.nn.functional as F
from hotswap_server.errors import InvalidRequestError
from hotswap_server.kernels import select_kernels
from hotswap_server.kernels.cpu import NativeKernels, OneDnnKernels
from hotswap_server.kernels.reference import ReferenceKernels

CPU = torch.device("cpu")
# Around the micro kernel's 6 rows, the block of 96 rows, and several blocks.
ROWS = (*range(1, 21), 33, 95, 96, 97, 193, 200)
SHAPES = ((16, 16), (1, 3), (7, 64), (48, 65), (100, 33), (130, 128), (577, 200))  # out, in
NAMES = ("native", "onednn", "reference")


@pytest.fixture(params=[1, 2], ids=["1thread", "2threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize("name", NAMES)
def test_linear_equals_the_double_precision_product(name, biased, threads):
    kernels = select_kernels(CPU, torch.float32, name)
    generator = torch.Generator().manual_seed(0)
    for out_features, in_features in SHAPES:
        weight = torch.randn(out_features, in_features, generator=generator)
        bias = torch.randn(out_features, generator=generator) if biased else None
        projection = kernels.projection(weight.clone(), None if bias is None else bias.clone())
        for rows in ROWS:
            x = torch.randn(rows, in_features, generator=generator)
            expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
            got = projection(x)
            assert got.shape == (rows, out_features)
            torch.testing.assert_close(got.double(), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_the_weight_comes_back_bit_for_bit(name):
    kernels = select_kernels(CPU, torch.float32, name)
    for out_features, in_features in SHAPES:
        weight = torch.randn(out_features, in_features)
        weight[0, 0], weight[-1, -1] = -0.0, 1e-42
        back = kernels.projection(weight.clone(), None).weight()
        assert back.shape == weight.shape
        assert torch.equal(back.contiguous().view(torch.int32), weight.view(torch.int32))


def test_a_row_is_the_same_in_every_batch():
    """What makes a request's tokens independent of its neighbours down to the last bit."""
    projection = select_kernels(CPU, torch.float32, "native").projection(torch.randn(130, 128), None)
    x = torch.randn(97, 128)
    alone = torch.cat([projection(row[None]) for row in x])
    for rows in ROWS[:-2]:
        assert torch.equal(projection(x[:rows]), alone[:rows]), rows


def test_rows_that_are_not_contiguous():
    kernels = select_kernels(CPU, torch.float32, "native")
    weight = torch.randn(20, 24)
    x = torch.randn(5, 48)[:, ::2]
    torch.testing.assert_close(kernels.projection(weight, None)(x), F.linear(x, weight), atol=1e-5, rtol=1e-5)


def test_selection_by_name_device_and_dtype():
    kinds = {"native": NativeKernels, "onednn": OneDnnKernels, "reference": ReferenceKernels}
    for name, kind in kinds.items():
        assert type(select_kernels(CPU, torch.float32, name)) is kind
    assert type(select_kernels(CPU, torch.float32)) is NativeKernels
    assert type(select_kernels(CPU, torch.bfloat16)) is ReferenceKernels
    with pytest.raises(InvalidRequestError, match="kernels: native serves float32 on a CPU"):
        select_kernels(CPU, torch.bfloat16, "native")
    with pytest.raises(InvalidRequestError, match="kernels: must be one of auto, native"):
        select_kernels(CPU, torch.float32, "cuda")
