"""What serving a base and its adapters needs, by the engine's rules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from hotswap_trainer.planning.four_bit import scale_bytes
from hotswap_trainer.planning.hardware import required
from hotswap_trainer.planning.units import GIB

_PAGE_TOKENS = 16  # the server's default page_size


@dataclass(frozen=True, slots=True)
class Serving:
    """Bytes of a base that is served: of its weights, as they are and in NF4, of a token's keys and values.

    `width` is that of a number in bytes.
    """

    weights: int
    weights_nf4: int
    kv_per_token: int
    width: int

    def kv_per_request(self, context: int) -> int:
        """Bytes of the pages that a request of `context` tokens fills."""
        return -(-context // _PAGE_TOKENS) * _PAGE_TOKENS * self.kv_per_token

    def adapter(self, num_trained: int) -> int:
        """Bytes of an adapter in device memory."""
        return num_trained * self.width

    def adapters_per_gb(self, num_trained: int) -> int:
        return GIB // self.adapter(num_trained)

    def requests(self, gpu: int, *, context: int, adapters: int, nf4: bool = False) -> int:
        """How many requests of `context` tokens a GPU of `gpu` bytes holds beside base and adapters."""
        room = gpu - required((self.weights_nf4 if nf4 else self.weights) + adapters)
        return max(0, room // self.kv_per_request(context))


def measure_serving(config: Any, model: nn.Module, width: int) -> Serving:
    """`model` is the base, with or without memory; sliding windows save nothing, as pages are not cut."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    output = model.get_output_embeddings()  # type: ignore[operator]
    weights = sum(p.numel() for p in model.parameters())
    linears = [
        m.in_features * m.out_features for m in model.modules() if type(m) is nn.Linear and m is not output
    ]
    packed = sum((count + 1) // 2 + scale_bytes(count) for count in linears)
    return Serving(
        weights * width,
        (weights - sum(linears)) * width + packed,
        2 * text.num_hidden_layers * heads * size * width,
        width,
    )
