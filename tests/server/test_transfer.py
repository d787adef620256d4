"""Tensors on their way to a slot: packed and scattered, they arrive as they would one by one."""

import pytest
import torch
from hotswap_server.adapters.transfer import SEGMENT_BYTES, Writes, beside_steps, packed

SHAPES = [(3, 5), (1,), (), (0, 7), (64, 33), (2, 3, 4)]


def tensors(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = [torch.randn(shape, generator=generator) for shape in SHAPES]
    return [*found, torch.arange(9, dtype=torch.int32), found[0].bfloat16(), found[4].t()]


def test_packed_tensors_are_equal_and_lie_together():
    loose = tensors(0)
    views = packed(loose)
    for view, tensor in zip(views, loose, strict=True):
        assert view.dtype is tensor.dtype
        assert torch.equal(view, tensor)
    assert len({view.untyped_storage().data_ptr() for view in views}) == 1
    assert views[0].untyped_storage().nbytes() < 2**15, "no more than they need"
    assert packed([]) == []


def test_blocks_are_filled_up():
    large = torch.zeros(SEGMENT_BYTES // 4 - 100)
    sizes = [v.untyped_storage().nbytes() for v in packed([large, torch.zeros(99), large])]
    assert sizes[0] == sizes[1] == SEGMENT_BYTES
    wide = torch.zeros(SEGMENT_BYTES)
    assert packed([wide])[0].untyped_storage().nbytes() == wide.nbytes


@pytest.mark.parametrize("before", [False, True])
def test_scattered_from_blocks_they_arrive_as_one_by_one(before):
    sources = tensors(1)
    sources = packed(sources) if before else sources
    banks = [[torch.full((4, *s.shape), 7, dtype=s.dtype) for s in sources] for _ in range(2)]
    for bank, add in zip(banks, (Writes.add, Writes.add_apart), strict=True):
        writes = Writes()
        for target, source in zip(bank, sources, strict=True):
            add(writes, target[2], source)
        writes.run()
    for one_by_one, scattered, source in zip(*banks, sources, strict=True):
        assert torch.equal(one_by_one, scattered)
        assert torch.equal(scattered[2], source)
        assert (scattered[[0, 1, 3]] == 7).all()


def test_numbers_arrive_together():
    targets = [torch.full((3, n), 7, dtype=torch.int32) for n in (1, 4)]
    writes = Writes()
    writes.add_numbers(targets[0][1], [5])
    writes.add_numbers(targets[1][2], [1, 2, 3, 4])
    writes.run()
    assert targets[0].tolist() == [[7], [5], [7]]
    assert targets[1].tolist() == [[7] * 4, [7] * 4, [1, 2, 3, 4]]


def test_on_a_cpu_nothing_is_beside_the_steps():
    with beside_steps(torch.device("cpu")):
        assert torch.ones(2).sum() == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_they_arrive_from_pinned_and_other_memory():
    for sources in (packed(tensors(2)), tensors(2)):
        targets = [torch.full((3, *s.shape), 7, dtype=s.dtype, device="cuda") for s in sources]
        with beside_steps(torch.device("cuda")):
            writes = Writes()
            for target, source in zip(targets, sources, strict=True):
                writes.add(target[1], source)
            writes.run()
        for target, source in zip(targets, sources, strict=True):
            assert torch.equal(target[1].cpu(), source)
            assert (target[[0, 2]] == 7).all()
