"""CPU kernels: the compiled C ones in float32, and oneDNN's prepacked linears where there is no compiler."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from hotswap_server.kernels.interface import (
    AttentionLayout,
    BottleneckTable,
    GroupedLora,
    LowRankUpdate,
    Projection,
    TokenSlots,
)
from hotswap_server.kernels.reference import (
    ReferenceKernels,
    attend_sequence,
    bottleneck_segment,
    gather_sequence,
)

_MAX_HEAD_DIM = 512  # attention.c's accumulator
_MAX_RANK = 1024  # lowrank.h's
_PACK_BATCH_HINT = 16  # oneDNN picks a weight layout for this many rows


class PanelProjection:
    """The weight in panels [panels, in_features, panel width], read by linear.c."""

    def __init__(
        self, library: ctypes.CDLL, panels: torch.Tensor, out_features: int, bias: torch.Tensor | None
    ) -> None:
        self._library = library
        self._panels = panels
        self.out_features, self.in_features = out_features, panels.shape[1]
        self._bias = None
        if bias is not None:
            self._bias = bias.new_zeros(panels.shape[0] * panels.shape[2])
            self._bias[:out_features] = bias

    @classmethod
    def pack(cls, library: ctypes.CDLL, weight: torch.Tensor, bias: torch.Tensor | None) -> PanelProjection:
        out_features, in_features = weight.shape
        width = library.hotswap_panel_width()
        panels = -(-out_features // width)
        padded = weight.new_zeros(panels * width, in_features)
        padded[:out_features] = weight
        packed = padded.view(panels, width, in_features).transpose(1, 2).contiguous()
        return cls(library, packed, out_features, bias)

    def merged(
        self, updates: Sequence[tuple[int, LowRankUpdate]], bias: torch.Tensor | None
    ) -> PanelProjection:
        """See `Kernels.merged`; one pass over the panels, on this thread alone."""
        target, width, done = torch.empty_like(self._panels), self._panels.shape[2], 0
        for first, update in updates:
            start, stop = first // width, -(-(first + update.b.shape[1]) // width)
            target[done:start] = self._panels[done:start]
            if start < done:  # the update before has written the panel that both reach
                self._update(target, target, start, done, first, update)
            if max(start, done) < stop:
                self._update(self._panels, target, max(start, done), stop, first, update)
            done = stop
        target[done:] = self._panels[done:]
        return PanelProjection(self._library, target, self.out_features, bias)

    def _update(
        self,
        source: torch.Tensor,
        target: torch.Tensor,
        start: int,
        stop: int,
        first: int,
        update: LowRankUpdate,
    ) -> None:
        """Panels `start` to `stop` of the target, of which the update may reach a part of the outer ones."""
        width = self._panels.shape[2]
        b = torch.zeros(update.rank, (stop - start) * width)
        scale = torch.ones((stop - start) * width)
        # The update's rows, and their columns here.
        begin = max(first, start * width)
        end = min(first + update.b.shape[1], stop * width)
        rows, columns = slice(begin - first, end - first), slice(begin - start * width, end - start * width)
        b[:, columns] = update.b[:, rows]
        if update.scale is not None:
            scale[columns] = update.scale[rows]
        a = update.a.float().contiguous()
        self._library.hotswap_merge(
            source[start].data_ptr(),
            a.data_ptr(),
            b.data_ptr(),
            scale.data_ptr(),
            target[start].data_ptr(),
            stop - start,
            self.in_features,
            update.rank,
        )

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous()
        out = x.new_empty(x.shape[0], self.out_features)
        self._library.hotswap_linear(
            x.data_ptr(),
            self._panels.data_ptr(),
            None if self._bias is None else self._bias.data_ptr(),
            out.data_ptr(),
            x.shape[0],
            self.out_features,
            self.in_features,
            torch.get_num_threads(),
        )
        return out

    def weight(self) -> torch.Tensor:
        return self._panels.transpose(1, 2).reshape(-1, self.in_features)[: self.out_features]


class OneDnnProjection:
    """oneDNN's own packed layout through `torch.ops.mkldnn`; the values are unchanged."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight, _PACK_BATCH_HINT)
        self._bias = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self._bias, "none", [], "")
        return out

    def weight(self) -> torch.Tensor:
        dense: torch.Tensor = self._packed.to_dense()
        return dense


class _CpuKernels(ReferenceKernels):
    """Nothing runs beside a product here: it has all threads."""

    def project_and_shrink(
        self, projection: Projection, x: torch.Tensor, bank: GroupedLora, slots: TokenSlots
    ) -> None:
        return None


class OneDnnKernels(_CpuKernels):
    """The reference with prepacked linears."""

    name = "onednn"

    def projection(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Projection:
        return OneDnnProjection(weight, bias)


class NativeKernels(_CpuKernels):
    """The C kernels; attention over prompts and long runs of a bottleneck adapter go through torch."""

    name = "native"

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def projection(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Projection:
        return PanelProjection.pack(self._library, weight, bias)

    def merged(
        self,
        projection: Projection,
        updates: Sequence[tuple[int, LowRankUpdate]],
        bias: torch.Tensor | None,
    ) -> Projection:
        if isinstance(projection, PanelProjection):
            return projection.merged(updates, bias)
        return super().merged(projection, updates, bias)

    def write_cache(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        layout: AttentionLayout,
    ) -> None:
        for given, cache in ((key, key_cache), (value, value_cache)):
            given = given if given.stride(2) == 1 else given.contiguous()
            self._library.hotswap_write_cache(
                given.data_ptr(),
                given.stride(0),
                given.stride(1),
                cache.data_ptr(),
                layout.token_pages.data_ptr(),
                layout.token_offsets.data_ptr(),
                given.shape[0],
                *cache.shape[1:],
            )

    def paged_attention(
        self,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        layout: AttentionLayout,
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        tokens, heads, head_dim = query.shape
        out = query.new_empty(tokens, heads, head_dim)
        decode = layout.num_decode if head_dim <= _MAX_HEAD_DIM else 0
        if decode:
            if query.stride(2) != 1:
                query = query.contiguous()
            self._library.hotswap_paged_attention(
                query.data_ptr(),
                query.stride(0),
                query.stride(1),
                key_cache.data_ptr(),
                value_cache.data_ptr(),
                layout.block_table.data_ptr(),
                layout.block_table.stride(0),
                layout.context.data_ptr(),
                out.data_ptr(),
                decode,
                heads,
                key_cache.shape[1],
                head_dim,
                key_cache.shape[2],
                window or 0,
                scale,
                softcap or 0.0,
                torch.get_num_threads(),
            )
        for sequence in range(decode, len(layout.context_lengths)):
            start, stop = layout.query_starts[sequence], layout.query_starts[sequence + 1]
            keys, values = gather_sequence(key_cache, value_cache, layout, sequence)
            out[start:stop] = attend_sequence(
                query[start:stop], keys, values, scale=scale, window=window, softcap=softcap
            )
        return out

    def lora(self, x: torch.Tensor, bank: GroupedLora, slots: TokenSlots, out: torch.Tensor) -> None:
        if bank.a.shape[2] > _MAX_RANK:
            super().lora(x, bank, slots, out)
            return
        members = len(bank.b)
        tables = (ctypes.c_void_p * members)(*(table.data_ptr() for table in bank.b))
        widths = (ctypes.c_int32 * members)(*bank.widths)
        offsets = (ctypes.c_int32 * members)(*bank.offsets)
        x = x.contiguous()
        self._library.hotswap_lora(
            x.data_ptr(),
            bank.a.data_ptr(),
            tables,
            slots.index.data_ptr(),
            bank.ranks.data_ptr(),
            widths,
            offsets,
            out.data_ptr(),
            x.shape[0],
            members,
            bank.a.shape[2],
            bank.a.shape[3],
            out.stride(0),
            torch.get_num_threads(),
        )

    def bottleneck(
        self, stream: torch.Tensor, x: torch.Tensor, table: BottleneckTable, slots: TokenSlots
    ) -> None:
        if table.down.shape[1] > _MAX_RANK:
            super().bottleneck(stream, x, table, slots)
            return
        for segment in slots.long:
            bottleneck_segment(stream, x, table, segment)
        if slots.rest is None:
            return
        self._library.hotswap_bottleneck(
            stream.data_ptr(),
            x.data_ptr(),
            table.down.data_ptr(),
            table.down_bias.data_ptr(),
            table.up.data_ptr(),
            table.up_bias.data_ptr(),
            slots.rest.data_ptr(),
            table.sizes.data_ptr(),
            table.activations.data_ptr(),
            table.layouts.data_ptr(),
            table.residuals.data_ptr(),
            x.shape[0],
            table.down.shape[1],
            x.shape[1],
            torch.get_num_threads(),
        )
