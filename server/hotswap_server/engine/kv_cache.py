"""The paged key-value cache: tensors of pages, and who holds which page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from hotswap_server.engine.attention import AttentionSite


class PagedKVCache:
    """Keys and values of all layers, each layer [pages, kv_heads, page_size, head_dim]."""

    def __init__(
        self,
        sites: Sequence[AttentionSite],
        *,
        num_pages: int,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.page_size = page_size
        self.pages = PagePool(num_pages)

        def allocate(site: AttentionSite) -> torch.Tensor:
            # Uninitialised: on a CPU memory is taken when a page is first written.
            return torch.empty(num_pages, site.kv_heads, page_size, site.head_dim, dtype=dtype, device=device)

        self.keys = [allocate(site) for site in sites]
        self.values = [allocate(site) for site in sites]

    @staticmethod
    def bytes_per_page(sites: Sequence[AttentionSite], page_size: int, dtype: torch.dtype) -> int:
        elements = sum(2 * site.kv_heads * site.head_dim for site in sites)
        return elements * page_size * dtype.itemsize

    def pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)


class PagePool:
    """Reference-counted page ids. A page returns to the pool when its last holder lets go."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._references = [0] * num_pages

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_pages - len(self._free)

    def allocate(self, count: int) -> list[int] | None:
        """`count` pages with one reference each, or None (and nothing taken) when there are too few."""
        if count > len(self._free):
            return None
        taken = [self._free.pop() for _ in range(count)]
        for page in taken:
            self._references[page] = 1
        return taken

    def is_idle(self, pages: Iterable[int]) -> bool:
        """Whether each of these has one holder."""
        return all(self._references[page] == 1 for page in pages)

    def share(self, pages: Iterable[int]) -> None:
        """Add a holder to pages that are in use."""
        for page in pages:
            self._references[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        for page in pages:
            self._references[page] -= 1
            if self._references[page] == 0:
                self._free.append(page)
