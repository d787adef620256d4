"""Prefix tuning (Li and Liang, 2021): trained keys and values before every sequence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from hotswap_server.adapters.checkpoint import RawCheckpoint
from hotswap_server.adapters.fields import check_fields
from hotswap_server.adapters.method import BankOptions, shown_fields
from hotswap_server.adapters.transfer import outlive_steps
from hotswap_server.engine.base import BaseModel
from hotswap_server.engine.prefixes import Prefix
from hotswap_server.errors import AdapterInvalidError

_TENSOR = "prompt_embeddings"
_READ = frozenset(
    {
        *("num_virtual_tokens", "num_layers", "num_attention_heads", "token_dim"),
        "num_transformer_submodules",
    }
)
# PEFT saves the prefix with its projection applied; how it began or was projected is past.
_WITHOUT_EFFECT = frozenset({"prefix_projection", "encoder_hidden_size", "init_weights"})


@dataclass(frozen=True, slots=True)
class PrefixAdapter:
    """A prefix in the base's type."""

    prefix: Prefix
    nbytes: int
    num_parameters: int
    details: Mapping[str, str]
    method: str = field(default="prefix", init=False)


class PrefixBank:
    """Places prefixes on the base; the engine writes them into pages."""

    def __init__(self, base: BaseModel, options: BankOptions) -> None:
        self.num_slots = options.num_slots
        self._base = base

    def put(self, slot: int, adapter: PrefixAdapter) -> None:
        device, prefix = self._base.device, adapter.prefix
        self._base.prefixes[METHOD.name, slot] = Prefix(
            prefix.digest,
            tuple(outlive_steps(keys.to(device)) for keys in prefix.keys),
            tuple(outlive_steps(values.to(device)) for values in prefix.values),
        )

    def clear(self, slot: int) -> None:
        self._base.prefixes.pop((METHOD.name, slot), None)


class PrefixMethod:
    """Reads PEFT's PREFIX_TUNING checkpoints: `prompt_embeddings` [tokens, layers * 2 * token_dim].

    Seen as [tokens, 2 * layers, kv_heads, head_dim], row 2i holds layer i's keys and row 2i + 1 its values.
    """

    name = "prefix"
    peft_type = "PREFIX_TUNING"

    def create_bank(self, base: BaseModel, options: BankOptions) -> PrefixBank:
        return PrefixBank(base, options)

    def bank_bytes(self, base: BaseModel, options: BankOptions) -> int:
        # As the slots hold them; their pages are the key-value cache's.
        per_token = sum(2 * site.kv_heads * site.head_dim for site in base.attention) * base.dtype.itemsize
        return options.num_slots * options.max_prefix_tokens * per_token

    def parse(self, checkpoint: RawCheckpoint, base: BaseModel, options: BankOptions) -> PrefixAdapter:
        config = checkpoint.config
        check_fields(config, read=_READ, without_effect=_WITHOUT_EFFECT)
        if unused := sorted(set(checkpoint.tensors) - {_TENSOR}):
            raise AdapterInvalidError(f"tensor {unused[0]}: is no part of a prefix, and nothing would use it")
        if _TENSOR not in checkpoint.tensors:
            raise AdapterInvalidError(f"tensor {_TENSOR} is missing")
        tensor = checkpoint.tensors[_TENSOR]
        tokens = _count(config, "num_virtual_tokens")
        kv_heads, head_dim = _check_shape(config, base)
        expected = [tokens, len(base.attention) * 2 * kv_heads * head_dim]
        if list(tensor.shape) != expected:
            raise AdapterInvalidError(
                f"tensor {_TENSOR}: is {list(tensor.shape)}, adapter_config.json and the base need {expected}"
            )
        if tokens > options.max_prefix_tokens:
            raise AdapterInvalidError(
                f"adapter_config.json: num_virtual_tokens {tokens} is over this server's limit of "
                f"{options.max_prefix_tokens}; start it with a larger max_prefix_tokens"
            )
        if tokens >= base.max_context:
            raise AdapterInvalidError(
                f"adapter_config.json: num_virtual_tokens {tokens} leaves no room in the base's context of "
                f"{base.max_context}"
            )
        rows = tensor.to(base.dtype).view(tokens, -1, kv_heads, head_dim).permute(1, 2, 0, 3).contiguous()
        return PrefixAdapter(
            prefix=Prefix(checkpoint.ref.digest, tuple(rows[0::2]), tuple(rows[1::2])),
            nbytes=rows.nbytes,
            num_parameters=tensor.numel(),
            details=shown_fields(config, ("num_virtual_tokens", "prefix_projection")),
        )


def _check_shape(config: Mapping[str, object], base: BaseModel) -> tuple[int, int]:
    """KV heads and their size, which all layers of the base must have, and the prefix too."""
    shapes = {(site.kv_heads, site.head_dim) for site in base.attention}
    if len(shapes) != 1:
        raise AdapterInvalidError("prefix: the base's layers have caches of different shapes")
    kv_heads, head_dim = shapes.pop()
    wanted = {
        "num_layers": len(base.attention),
        "num_attention_heads": kv_heads,
        "token_dim": kv_heads * head_dim,
    }
    for name, value in wanted.items():
        if _count(config, name) != value:
            raise AdapterInvalidError(
                f"adapter_config.json: {name} is {config[name]}, the base's cache needs {value}"
            )
    if config.get("num_transformer_submodules") not in (None, 1):
        raise AdapterInvalidError(
            "adapter_config.json: num_transformer_submodules must be 1, as a decoder-only base has it"
        )
    return kv_heads, head_dim


def _count(config: Mapping[str, object], name: str) -> int:
    value = config.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise AdapterInvalidError(f"adapter_config.json: {name} must be a whole number over 0, got {value!r}")
    return value


METHOD = PrefixMethod()
