"""Prefixes: keys and values before a sequence's own, in pages that all sequences with the same one share."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from hotswap_server.engine.kv_cache import PagedKVCache


@dataclass(frozen=True, slots=True, eq=False)
class Prefix:
    """Keys and values by layer, [kv_heads, tokens, head_dim], as they lie in the cache: nothing rotates them.

    `digest` is that of the adapter's content: the same content takes the same pages, whatever its name.
    """

    digest: str
    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]

    @property
    def num_tokens(self) -> int:
        return int(self.keys[0].shape[1])


PlacedPrefixes = Mapping[tuple[str, int], Prefix]
"""By method and slot. Banks change it on their threads; what is read of it is one entry or a copy."""


class PrefixPages:
    """The full pages of prefixes, written when first needed and shared by reference count.

    The rest of a prefix, less than a page, goes into each sequence's own first page. The engine thread alone
    calls this. A prefix that no running sequence uses only fills pages until somebody else needs them.
    """

    def __init__(self, cache: PagedKVCache, placed: PlacedPrefixes) -> None:
        self._cache = cache
        self._placed = placed
        self._pages: OrderedDict[str, list[int]] = OrderedDict()  # by digest, least recently used first
        self.num_pages = 0
        """Pages held here, whoever else holds them."""

    def placed(self, method: str, slot: int) -> Prefix | None:
        """The prefix that a slot's adapter brings."""
        return self._placed.get((method, slot))

    def num_missing(self, prefix: Prefix) -> int:
        """Pages that `share` would take from the pool."""
        return 0 if prefix.digest in self._pages else prefix.num_tokens // self._cache.page_size

    def share(self, prefix: Prefix) -> list[int]:
        """The full pages of `prefix` with a reference for the caller; the pool must have `num_missing`."""
        pages = self._pages.get(prefix.digest)
        if pages is None:
            pages = self._cache.pages.allocate(self.num_missing(prefix))
            if pages is None:
                raise RuntimeError("a prefix is shared once there is room for it")
            try:
                for index, page in enumerate(pages):
                    self._write(prefix, index, page)
            except BaseException:
                self._cache.pages.release(pages)
                raise
            # Only once they are whole: a failed write must not be found by the next request.
            self._pages[prefix.digest] = pages
            self.num_pages += len(pages)
        self._pages.move_to_end(prefix.digest)
        self._cache.pages.share(pages)
        return list(pages)

    def drop(self, prefix: Prefix) -> None:
        """Let go of a prefix's full pages, as if nobody had needed them."""
        if prefix.digest in self._pages:
            self._release(prefix.digest)

    def write_rest(self, prefix: Prefix, page: int) -> None:
        """Begin a sequence's own first page with what the full pages leave over."""
        if prefix.num_tokens % self._cache.page_size:
            self._write(prefix, prefix.num_tokens // self._cache.page_size, page)

    def make_room(self, count: int, keep: Prefix | None = None) -> bool:
        """Whether `count` pages are free, if need be after idle prefixes but `keep` gave theirs back."""
        pool = self._cache.pages
        for digest in list(self._pages):
            if pool.num_free >= count:
                break
            if (keep is None or digest != keep.digest) and pool.is_idle(self._pages[digest]):
                self._release(digest)
        return pool.num_free >= count

    def forget_left(self) -> None:
        """Let go of prefixes whose adapters have left their slots; sequences keep what they share."""
        if not self._pages:
            return
        here = {prefix.digest for prefix in list(self._placed.values())}
        for digest in [digest for digest in self._pages if digest not in here]:
            self._release(digest)

    def _release(self, digest: str) -> None:
        pages = self._pages.pop(digest)
        self.num_pages -= len(pages)
        self._cache.pages.release(pages)

    def _write(self, prefix: Prefix, index: int, page: int) -> None:
        span = slice(index * self._cache.page_size, (index + 1) * self._cache.page_size)
        for cache, given in (
            *zip(self._cache.keys, prefix.keys, strict=True),
            *zip(self._cache.values, prefix.values, strict=True),
        ):
            rows = given[:, span]
            cache[page, :, : rows.shape[1]] = rows
