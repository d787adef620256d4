"""How many bytes a computation holds at its worst, counted as its tensors come and go."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the storages that operations make, while the mode is on, until the last tensor on them is gone.

    Works on tensors without memory as well: these have sizes and lifetimes, which is all that is read.
    Storages of `known` tensors are not counted. `peak` is the most at once, gradients included,
    `peak_activations` the most of all but what `count_gradient` was told of.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.gradients = 0
        self.peak = 0
        self.peak_activations = 0
        self._storages = {tensor.untyped_storage()._cdata for tensor in known}

    def count_gradient(self, parameter: Tensor) -> None:
        """A hook for `register_post_accumulate_grad_hook`."""
        if parameter.grad is not None:
            self.gradients += parameter.grad.untyped_storage().nbytes()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._storages:
            return
        self._storages.add(key)
        nbytes = storage.nbytes()
        self.live += nbytes
        self.peak = max(self.peak, self.live)
        self.peak_activations = max(self.peak_activations, self.live - self.gradients)
        weakref.finalize(storage, self._drop, key, nbytes)

    def _drop(self, key: int, nbytes: int) -> None:
        self._storages.discard(key)
        self.live -= nbytes
