"""Prefix tuning: trained keys and values before every sequence (https://arxiv.org/abs/2101.00190)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hotswap_trainer.errors import OptionError
from hotswap_trainer.method import Method
from hotswap_trainer.options import option

if TYPE_CHECKING:
    from peft import PrefixTuningConfig
    from torch import Tensor
    from transformers import PreTrainedModel

    from hotswap_trainer.config import TrainOptions


@dataclass(frozen=True, slots=True)
class PrefixOptions:
    """Options of prefix tuning."""

    num_virtual_tokens: int = option(20, help="Length of the prefix, in tokens.")
    prefix_projection: bool = option(
        False, help="Train the prefix through a small network, of which only the product is kept."
    )
    encoder_hidden_size: int | None = option(
        None, help="Width of that network; by default that of one layer's keys."
    )

    def __post_init__(self) -> None:
        if self.num_virtual_tokens < 1:
            raise OptionError(f"--num-virtual-tokens: must be at least 1, got {self.num_virtual_tokens}")
        if self.encoder_hidden_size is not None:
            if self.encoder_hidden_size < 1:
                raise OptionError(
                    f"--encoder-hidden-size: must be at least 1, got {self.encoder_hidden_size}"
                )
            if not self.prefix_projection:
                raise OptionError("--encoder-hidden-size: needs --prefix-projection")


class Prefix(Method[PrefixOptions]):
    """PEFT saves one tensor, `prompt_embeddings` `[num_virtual_tokens, num_layers * 2 * token_dim]`, where
    `token_dim` is KV heads times their size. Seen as `[tokens, 2 * num_layers, KV heads, head size]`, row 2i
    holds the keys of layer i as they lie in its cache (no rotation is to be applied to them) and row 2i+1 its
    values. A projection is already applied in it, though the configuration still says `prefix_projection`.
    Tokens take positions from num_virtual_tokens on.

    A row of a batch must be one sequence: of several packed into a row only the first would follow the prefix
    at the right distance. The trainer never packs, and has no option to.
    """

    name = "prefix"
    summary = "trained keys and values before every sequence"
    learning_rate = 1e-2
    options = PrefixOptions

    def check(self, run: TrainOptions, options: PrefixOptions) -> None:
        if run.gradient_checkpointing:
            raise OptionError(
                "--gradient-checkpointing: does not work with prefix tuning, whose keys and values lie in a "
                "cache that recomputation would extend twice; lower --batch-size and raise --accumulation"
            )

    def peft_config(self, model: PreTrainedModel, options: PrefixOptions) -> PrefixTuningConfig:
        from peft import PrefixTuningConfig

        return PrefixTuningConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=options.num_virtual_tokens,
            prefix_projection=options.prefix_projection,
            encoder_hidden_size=options.encoder_hidden_size,  # type: ignore[arg-type]
        )

    def attach(self, model: PreTrainedModel, options: PrefixOptions) -> Any:
        """Without a projection the prefix starts as the keys and values of random tokens.

        Activations of real words, related or not, train better than random numbers (section 7.4 of the
        paper), which disturb the base until they are unlearnt.
        """
        from peft.tuners.cartridge.utils import initialize_kv_prefix_from_past_key_values

        adapted = super().attach(model, options)
        if not options.prefix_projection:
            try:
                initialize_kv_prefix_from_past_key_values(
                    adapted, past_key_values=_activations(model, options.num_virtual_tokens)
                )
            except ValueError as error:
                raise OptionError(f"--base: its layers' caches cannot hold such a prefix: {error}") from error
        return adapted


METHOD = Prefix()


def _activations(model: PreTrainedModel, count: int) -> list[tuple[Tensor, Tensor]]:
    """Keys and values `[1, KV heads, count, head size]` by layer, of random tokens after a first one."""
    import torch

    config = model.config.get_text_config()
    ids = torch.randint(config.vocab_size, (1, count))
    if isinstance(config.bos_token_id, int):
        ids[0, 0] = config.bos_token_id
    with torch.no_grad():
        cache = model(input_ids=ids.to(model.device), use_cache=True).past_key_values
    return [(layer.keys, layer.values) for layer in cache.layers]
