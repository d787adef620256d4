"""Linear layers over weights in 4 bits with their LoRAs beside, against their unpacked weights."""

import copy

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("bitsandbytes")

from bitsandbytes import functional
from hotswap_server.bench.quantized import quantize_linears
from hotswap_server.engine.base import prepare_base
from hotswap_server.engine.batch import token_slots
from hotswap_server.kernels import GroupedLora
from hotswap_server.kernels.interface import FourBitWeight, slot_tiles
from hotswap_server.kernels.quantized import FourBitProjection
from hotswap_server.kernels.reference import ReferenceKernels, unpack_four_bit
from hotswap_server.kernels.triton import FusedFourBitProjection, TritonKernels
from hotswap_server.kernels.triton.four_bit import (
    FourBitTiling,
    four_bit_linear,
    four_bit_tiling,
    lookup,
    unpack,
)
from hotswap_server.kernels.triton.lora_rows import expand_rows
from support.models import FAMILIES, tiny_model
from support.quantized import unpacked

TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}
CPU = torch.device("cpu")
# The last member shares a block of columns with the one before it.
WIDTHS, RANKS, MAX_RANK = (64, 40, 33), ((8, 8, 8), (1, 0, 20), (0, 0, 0), (0, 20, 3)), 20
CUTS = {
    "whole": FourBitTiling(64, 1, 2, 2, False, 1),
    "in_parts": FourBitTiling(32, 3, 4, 2, False, 2),
    "columns_by_rows": FourBitTiling(64, 2, 4, 2, True, 1),
}


@pytest.fixture(params=TOLERANCE, ids=str)
def dtype(request, device):
    if device.type == "cpu" and request.param != torch.float32:
        pytest.skip("the interpreter has numpy's types alone")
    return request.param


def source(
    out_features: int, in_features: int, dtype: torch.dtype, *, kind: str = "nf4", nested: bool = True, seed=0
) -> FourBitProjection:
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(out_features, in_features, generator=generator) * 0.1).to(dtype)
    packed, state = functional.quantize_4bit(weight, quant_type=kind, compress_statistics=nested)
    return FourBitProjection(packed, state, None, dtype)


def on(device: torch.device, weight: FourBitWeight) -> FourBitWeight:
    packed, scales, code = (part.to(device) for part in (weight.packed, weight.scales, weight.code))
    return FourBitWeight(packed, scales, code, weight.values, weight.chunk, weight.dtype)


@pytest.mark.parametrize("in_features", [128, 96, 48])  # rows that end with a block, and in the midst of one
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [True, False])
def test_unpacked_is_what_bitsandbytes_unpacks(device, dtype, in_features, kind, nested):
    given = source(70, in_features, dtype, kind=kind, nested=nested)
    weight = given.resolved()
    assert torch.equal(unpack_four_bit(weight), given.weight())
    assert torch.equal(unpack(on(device, weight)).cpu(), given.weight())


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("in_features", [640, 288])
@pytest.mark.parametrize("index", [None, [0], [1, -1, 3], [0, 0, 1, 3, -1, 2] * 4])
def test_four_bit_linear(device, dtype, cut, in_features, index):
    weight = source(sum(WIDTHS), in_features, dtype).resolved()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3 if index is None else len(index), in_features, generator=generator).to(dtype)
    bias = torch.randn(sum(WIDTHS), generator=generator).to(dtype) if index != [0] else None
    # In the scales' own precision: the kernel rounds no more than the codes.
    exact = unpack_four_bit(
        FourBitWeight(weight.packed, weight.scales, weight.code, weight.values, weight.chunk, torch.float32)
    )
    expected = torch.nn.functional.linear(x.double(), exact.double(), None if bias is None else bias.double())
    options = {}
    if index is not None:
        # Rows beyond a rank are NaN: reading one shows.
        a = torch.full((len(RANKS), len(WIDTHS), MAX_RANK, in_features), torch.nan)
        b = tuple(torch.full((len(RANKS), MAX_RANK, width), torch.nan) for width in WIDTHS)
        for slot, ranks in enumerate(RANKS):
            for member, rank in enumerate(ranks):
                a[slot, member, :rank] = torch.randn(rank, in_features, generator=generator) * 0.1
                b[member][slot, :rank] = torch.randn(rank, WIDTHS[member], generator=generator) * 0.3
        offsets = tuple(sum(WIDTHS[:member]) for member in range(len(WIDTHS)))
        banks = [
            GroupedLora(
                a.to(dtype).to(where, kind),
                tuple(t.to(dtype).to(where, kind) for t in b),
                torch.tensor(RANKS, dtype=torch.int32, device=where),
                WIDTHS,
                offsets,
            )
            for where, kind in ((CPU, torch.float64), (device, dtype))
        ]
        slots = np.array(index, np.int32)
        ReferenceKernels().lora(x.double(), banks[0], token_slots(slots, CPU), expected)
        options = {"bank": banks[1], "tiles": torch.from_numpy(slot_tiles(slots)[0]).to(device)}
    counters = torch.zeros(sum(WIDTHS), dtype=torch.int32, device=device)
    shift = None if bias is None else bias.to(device)
    for _ in range(2):  # the second finds the counters as the first has left them
        got, hidden = four_bit_linear(
            x.to(device), on(device, weight), shift, counters, cut=CUTS[cut], **options
        )
        if options:
            expand_rows(hidden, options["bank"], options["tiles"], got)
        scale = expected.abs().max()
        torch.testing.assert_close(
            got.cpu().double() / scale, expected / scale, atol=TOLERANCE[dtype], rtol=0
        )
        assert not counters.any()


@pytest.mark.parametrize("tokens", [1, 17, 40, 100, 300])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_members_in_one_projection(device, dtype, tokens, kind):
    """Few tokens in one product, some in two, and many over the weight unpacked."""
    members = [source(width, 256, dtype, kind=kind, seed=width) for width in WIDTHS]
    for member in members:
        member.packed, member.state = member.packed.to(device), moved(member.state, device)
    bias = torch.randn(sum(WIDTHS), device=device).to(dtype)
    projection = TritonKernels().four_bit(members, bias)
    weight = torch.cat([member.weight() for member in members])
    assert torch.equal(projection.weight(), weight)
    assert projection.nbytes == weight.numel() // 2 + weight.numel() // 64 * 4
    x = torch.randn(tokens, 256, device=device).to(dtype)
    expected = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    scale = expected.abs().max()
    torch.testing.assert_close(
        projection(x).double() / scale, expected / scale, atol=TOLERANCE[dtype], rtol=0
    )


def moved(state, device):
    state.to(device)
    return state


def test_members_that_stay_apart(device):
    narrow = source(16, 48, torch.float32)  # its scales are of 16 inputs
    assert TritonKernels().four_bit([narrow], None) is None
    assert TritonKernels().four_bit([source(16, 64, torch.float32), narrow], None) is None
    assert ReferenceKernels().four_bit([source(16, 64, torch.float32)], None) is None


@pytest.mark.filterwarnings("ignore:inner dimension")  # bitsandbytes, of its own kernel for a GPU
def test_the_groups_of_a_base(device):
    """Every group is one product, rows that end in the midst of a block too, and its bytes are counted."""
    model = tiny_model(FAMILIES["llama"]).to(device)
    plain = dict(copy.deepcopy(model).named_parameters())
    quantize_linears(model, torch.float32)
    base = prepare_base(model, kernels=TritonKernels())
    assert base.quantization == "nf4"
    assert [len(group.names) for group in base.projections] == [3, 1, 2, 1] * 2
    others = set(plain)
    for group in base.projections:
        assert isinstance(group.projection, FusedFourBitProjection)
        for name in group.names:
            others.remove(f"{name}.weight")
            weight = plain[f"{name}.weight"].data
            packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
            assert torch.equal(group.weight_of(name), unpacked(packed, state))
    taken = sum(group.projection.nbytes for group in base.projections)
    assert base.weight_bytes == taken + sum(plain[name].nbytes for name in others)
    group = base.projections[0]
    x = torch.randn(3, group.in_features, device=device)
    expected = torch.nn.functional.linear(x, group.projection.weight())
    torch.testing.assert_close(group.compute(x), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("tokens", [1, 16, 17, 32, 33, 64])
@pytest.mark.parametrize("shape", [(4096, 4096), (28672, 4096), (4096, 14336), (64, 32)])
def test_a_tiling_leaves_every_program_something(tokens, shape):
    cut = four_bit_tiling(*shape, tokens, 32 if shape[1] == 32 else 64)
    assert 1 <= cut.splits <= max(1, shape[1] // 64 // cut.unroll)


def test_ptx_is_made_of_the_codes():
    values = source(16, 64, torch.float32).resolved().values
    assert lookup(values, torch.bfloat16) != lookup(values, torch.float16)
    assert "0x80" in lookup(values, torch.bfloat16)  # the lower bytes of -1.0 and -0.6962: 0x80, 0x32
