"""Adapters on their way from host memory to a slot: a few large copies beside the steps, and few kernels.

A copy for each of an adapter's hundreds of tensors costs more than what it moves, and one on the stream of
the steps waits for those that are underway.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final

import torch

SEGMENT_BYTES: Final = 2**23
"""Of one block of packed tensors. Pinned memory comes in powers of two."""
_ALIGNMENT: Final = 256

_streams: dict[torch.device, torch.cuda.Stream] = {}
_lock = threading.Lock()


@contextmanager
def beside_steps(device: torch.device) -> Iterator[None]:
    """Run what is inside on a stream of its own, and wait for it at the end; on a CPU nothing of the kind.

    What is written must be read by no step that counts, and what is allocated there must outlive the steps
    that read it, or be told by `outlive_steps`.
    """
    if device.type != "cuda":
        yield
        return
    with _lock:
        stream = _streams.get(device)
        if stream is None:
            # Before the steps' kernels: those of a copy are few and short, and a request waits for it.
            stream = _streams[device] = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        yield
        stream.synchronize()


def outlive_steps(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor`, whose memory is then not used anew before the steps launched until it is freed are done."""
    if tensor.device.type == "cuda":
        tensor.record_stream(torch.cuda.default_stream(tensor.device))
    return tensor


def packed(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Copies of `tensors` that lie in few blocks of host memory, which is pinned where there is a GPU."""
    pin = torch.cuda.is_available()
    views: list[torch.Tensor] = []
    sizes = [-(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT for tensor in tensors]
    left, block, used = sum(sizes), torch.empty(0, dtype=torch.uint8), 0
    for tensor, size in zip(tensors, sizes, strict=True):
        if used + size > len(block):
            room = max(min(SEGMENT_BYTES, left), size)
            block, used = torch.empty(room, dtype=torch.uint8, pin_memory=pin), 0
        view = block[used : used + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        views.append(view.copy_(tensor))
        used, left = used + size, left - size
    return views


class Writes:
    """Copies of tensors in host memory to places on one device.

    What is packed in pinned memory is on its way, a block at a time, once it is first named, and `run`
    scatters it on the device. Other tensors are packed by `run`.
    """

    def __init__(self) -> None:
        # On the device, by where they are in host memory, as bytes and as what was found in them.
        self._blocks: dict[int, torch.Tensor | None] = {}
        self._views: dict[tuple[int, torch.dtype], torch.Tensor] = {}
        self._scattered: dict[torch.dtype, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
        self._loose: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._numbers: list[tuple[torch.Tensor, Sequence[int]]] = []

    def add(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """`target` gets `source`, of the same shape and type."""
        if target.device == source.device:
            target.copy_(source)
        else:
            self.add_apart(target, source)

    def add_apart(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """The same, whether they are on the same device or not."""
        key = source.untyped_storage().data_ptr()
        if key not in self._blocks:
            self._blocks[key] = _moved(source, target.device) if source.is_pinned() else None
        block = self._blocks[key]
        if block is None:
            self._loose.append((target, source))
        else:
            self._scatter(target, source, key, block)

    def add_numbers(self, target: torch.Tensor, numbers: Sequence[int]) -> None:
        """`target` [n] int32 gets n `numbers`."""
        self._numbers.append((target, numbers))

    def run(self) -> None:
        """Do all that is left, on the current stream if the device has any."""
        if self._numbers:
            together = torch.tensor([n for _, numbers in self._numbers for n in numbers], dtype=torch.int32)
            there = together.to(self._numbers[0][0].device, non_blocking=True)
            parts = torch.split(there, [len(numbers) for _, numbers in self._numbers])
            torch._foreach_copy_([target for target, _ in self._numbers], list(parts))
        if self._loose:
            self._pack_loose()
        for targets, sources in self._scattered.values():
            torch._foreach_copy_(targets, sources)

    def _pack_loose(self) -> None:
        blocks: dict[int, torch.Tensor] = {}
        views = packed([source for _, source in self._loose])
        for (target, _), view in zip(self._loose, views, strict=True):
            key = view.untyped_storage().data_ptr()
            if key not in blocks:
                blocks[key] = _moved(view, target.device)
            self._scatter(target, view, key, blocks[key])

    def _scatter(self, target: torch.Tensor, source: torch.Tensor, key: int, block: torch.Tensor) -> None:
        dtype = source.dtype
        view = self._views.get((key, dtype))
        if view is None:
            view = self._views[key, dtype] = block.view(dtype)
        targets, sources = self._scattered.setdefault(dtype, ([], []))
        targets.append(target)
        sources.append(view.as_strided(source.shape, source.stride(), source.storage_offset()))


def _moved(source: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The bytes of all the memory that `source` lies in, on their way to `device`."""
    whole = torch.empty(0, dtype=torch.uint8).set_(source.untyped_storage())
    return whole.to(device, non_blocking=True)
