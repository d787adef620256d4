"""Linear layers of a few tokens with their LoRAs inside, against double precision."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from hotswap_server.engine.batch import token_slots
from hotswap_server.kernels import GroupedLora
from hotswap_server.kernels.interface import slot_tiles
from hotswap_server.kernels.reference import ReferenceKernels
from hotswap_server.kernels.triton.linear import Tiling, linear
from hotswap_server.kernels.triton.lora_rows import expand_rows

TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 1.5e-2}
CPU = torch.device("cpu")
# The last member shares a block of columns with the one before it.
WIDTHS, RANKS, IN_FEATURES, MAX_RANK = (64, 40, 33), ((8, 8, 8), (1, 0, 20), (0, 0, 0), (0, 20, 3)), 600, 20
CUTS = {"rows_by_columns": Tiling(32, 128, 4, 2, False), "columns_by_rows": Tiling(64, 64, 4, 2, True)}


@pytest.fixture(params=TOLERANCE, ids=["float32", "bfloat16"])
def dtype(request, device):
    if device.type == "cpu" and request.param != torch.float32:
        pytest.skip("the interpreter has numpy's types alone")
    return request.param


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("index", [None, [0], [1, -1, 3], [2, 2], [0, 0, 1, 3, -1, 2] * 4])
def test_linear(device, dtype, cut, index):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3 if index is None else len(index), IN_FEATURES, generator=generator).to(dtype)
    weight = (torch.randn(sum(WIDTHS), IN_FEATURES, generator=generator) * 0.1).to(dtype)
    bias = torch.randn(sum(WIDTHS), generator=generator).to(dtype) if index != [0] else None
    offsets = tuple(sum(WIDTHS[:member]) for member in range(len(WIDTHS)))
    # Rows beyond a rank are NaN: reading one shows.
    a = torch.full((len(RANKS), len(WIDTHS), MAX_RANK, IN_FEATURES), torch.nan)
    b = tuple(torch.full((len(RANKS), MAX_RANK, width), torch.nan) for width in WIDTHS)
    for slot, ranks in enumerate(RANKS):
        for member, rank in enumerate(ranks):
            a[slot, member, :rank] = torch.randn(rank, IN_FEATURES, generator=generator) * 0.1
            b[member][slot, :rank] = torch.randn(rank, WIDTHS[member], generator=generator) * 0.3
    ranks = torch.tensor(RANKS, dtype=torch.int32)
    expected = torch.nn.functional.linear(
        x.double(), weight.double(), None if bias is None else bias.double()
    )
    options = {}
    if index is not None:
        slots = np.array(index, np.int32)
        twin = GroupedLora(
            a.to(dtype).double(), tuple(t.to(dtype).double() for t in b), ranks, WIDTHS, offsets
        )
        ReferenceKernels().lora(x.double(), twin, token_slots(slots, CPU), expected)
        bank = GroupedLora(
            a.to(device, dtype), tuple(t.to(device, dtype) for t in b), ranks.to(device), WIDTHS, offsets
        )
        options = {"bank": bank, "tiles": torch.from_numpy(slot_tiles(slots)[0]).to(device)}
    there = [None if tensor is None else tensor.to(device) for tensor in (x, weight, bias)]
    got, hidden = linear(*there, cut=CUTS[cut], **options)
    if options:
        expand_rows(hidden, options["bank"], options["tiles"], got)
    scale = expected.abs().max()
    torch.testing.assert_close(got.cpu().double() / scale, expected / scale, atol=TOLERANCE[dtype], rtol=0)
