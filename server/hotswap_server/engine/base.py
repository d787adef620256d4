"""The base model: loaded through transformers, traced, and fitted with our attention and linears."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hotswap_server.engine.attention import (
    ATTENTION_NAME,
    TRACE_NAME,
    AttentionSite,
    LayerAttention,
    StepState,
    trace_into,
)
from hotswap_server.engine.blocks import Block, BlocksNotFoundError, Call, find_blocks, hidden_states
from hotswap_server.engine.merging import MergedWeights
from hotswap_server.engine.prefixes import Prefix
from hotswap_server.engine.projection import GroupedProjection, Linear, ProjectionGroup
from hotswap_server.engine.quantization import quantization_arguments, quantization_of, take_over
from hotswap_server.engine.sites import EmbeddingSite, OutputSite, find_biased, find_embedding
from hotswap_server.errors import BaseModelError
from hotswap_server.kernels import Kernels

# Their rotation of a position depends on the longest sequence of the batch, so a request would depend on
# its neighbours.
_BATCH_DEPENDENT_ROPE = ("dynamic", "longrope")


@dataclass(frozen=True, slots=True)
class BaseModel:
    """A causal LM ready for the engine, with the places where adapters attach.

    `projections` are the groups of linear layers inside the decoder that share an input, by their members'
    module names; `attention` is one entry per decoder layer, in order, and `layers` are these; `blocks` are
    the sub-layers, none where they cannot be told, for the reason in `blocks_problem`. `head` is the group of
    the output embedding alone, which sees the step's logit rows; `tied_head` says whether its weight is the
    embedding's. `biased` are the other modules with a bias. `quantization` is nf4, fp4, int8 or None, and
    `weight_bytes` what the parameters take so, the scales of quantised ones included.
    """

    model: nn.Module
    config: Any
    projections: tuple[ProjectionGroup, ...]
    attention: tuple[AttentionSite, ...]
    blocks: tuple[Block, ...]
    layers: tuple[nn.Module, ...]
    state: StepState
    device: torch.device
    dtype: torch.dtype
    max_context: int
    eos_token_ids: frozenset[int]
    quantization: str | None
    weight_bytes: int
    linear_shapes: dict[str, tuple[int, int]] = field(default_factory=dict)
    """(out_features, in_features) of every linear module inside the decoder, by module name."""
    blocks_problem: str = ""
    prefixes: dict[tuple[str, int], Prefix] = field(default_factory=dict)
    """What adapters put before a sequence's own keys and values, by method and slot."""
    head: ProjectionGroup | None = None
    tied_head: bool = False
    embedding: EmbeddingSite | None = None
    biased: tuple[OutputSite, ...] = ()
    biases: dict[str, torch.Tensor] = field(default_factory=dict)
    """Every bias of the base, by the name of its module."""
    merged: MergedWeights = field(default_factory=MergedWeights)
    """The adapter that is in the projections' weights, if one is."""

    @property
    def groups(self) -> tuple[ProjectionGroup, ...]:
        """`projections` and the head."""
        return self.projections if self.head is None else (*self.projections, self.head)

    @property
    def head_shape(self) -> dict[str, tuple[int, int]]:
        """As `linear_shapes`, of the head."""
        head = self.head
        return {} if head is None else {head.names[0]: (head.widths[0], head.in_features)}

    def detach_adapters(self) -> None:
        """Take every adapter method off the base."""
        self.merged.install(None)
        for place in (*self.groups, *self.blocks, self.embedding, *self.biased):
            if place is not None:
                place.detach()
        self.prefixes.clear()

    @property
    def compiled(self) -> bool:
        """Whether the layers are compiled; see `compile_layers`."""
        return self.state.compiled

    @property
    def vocab_size(self) -> int:
        return int(self.config.vocab_size)


def load_base(
    path: Path, *, kernels: Kernels, device: torch.device, dtype: torch.dtype, quantize: str | None = None
) -> BaseModel:
    """Load a transformers directory and prepare it, its linears held as `quantize` says: nf4, fp4 or int8.

    A base that bitsandbytes quantised before it was stored stays so.

    Raises:
        BaseModelError: the directory does not hold a causal LM that the engine can serve.
        InvalidRequestError: it cannot be quantised so.
    """
    arguments = quantization_arguments(path, quantize, device=device, dtype=dtype)
    model = load_causal_lm(path, dtype=dtype, **arguments)
    if not arguments:  # quantised weights are made where they are to be
        model = model.to(device)
    return prepare_base(model, kernels=kernels)


def load_causal_lm(path: Path, **arguments: Any) -> Any:
    """transformers' own model of a directory.

    Raises:
        BaseModelError: there is none, or it does not fit the device.
    """
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(path, local_files_only=True, **arguments)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise BaseModelError(f"base: transformers cannot load a causal LM from it: {error}") from error


def prepare_base(model: nn.Module, *, kernels: Kernels) -> BaseModel:
    """Trace `model` with two tokens, then replace its linears and its attention in place.

    Raises:
        BaseModelError: the model does not go through transformers' attention interface, or uses a feature
            that would make a request depend on its neighbours.
    """
    config: Any = model.config
    _check_supported(config)
    model.eval().requires_grad_(False)
    parameter = next(p for p in model.parameters() if p.is_floating_point())
    weight_bytes = sum(parameter.nbytes for parameter in model.parameters())
    quantization = quantization_of(config)
    if quantization is not None:
        weight_bytes += take_over(model, quantization, parameter.dtype)
    calls, sites = _trace(model)
    head = model.get_output_embeddings()  # type: ignore[operator]
    linears = _groups(call for call in calls if call.module is not head)
    shapes = {name: (module.out_features, module.in_features) for group in linears for name, module in group}
    names = {module: name for name, module in model.named_modules()}
    state = StepState(kernels)
    grouped = {name for group in linears for name, _ in group} | (
        {names[head]} if head is not None else set()
    )
    biases = _biases(model)
    biased = find_biased(calls, grouped, state)
    blocks, problem = _blocks(model, sites, calls, state)
    embedding = find_embedding(model, state)
    tied = embedding is not None and head is not None and head.weight is embedding.weight
    groups = []
    head_group = None
    with torch.inference_mode():
        for members in linears:
            groups.append(_replace(model, members, kernels))
        if isinstance(head, Linear):
            head_group = _replace(model, [(names[head], head)], kernels)
    sources = {block.source: block for block in blocks}
    for group in groups:
        if len(group.names) == 1:
            group.block = sources.get(group.names[0])
    weight_bytes += sum(group.added_bytes for group in groups)
    for module, site in sites.items():
        module.hotswap_attention = LayerAttention(site.layer, state)  # type: ignore[assignment]
        module.hotswap_hidden = False  # type: ignore[assignment]
    model.set_attn_implementation(ATTENTION_NAME)  # type: ignore[operator]
    return BaseModel(
        model=model,
        config=config,
        projections=tuple(groups),
        attention=tuple(sites.values()),
        blocks=blocks,
        layers=tuple(dict.fromkeys(model.get_submodule(names[site].rpartition(".")[0]) for site in sites)),
        state=state,
        device=parameter.device,
        dtype=parameter.dtype,
        max_context=int(config.max_position_embeddings),
        eos_token_ids=_eos_token_ids(model),
        quantization=quantization,
        weight_bytes=weight_bytes,
        linear_shapes=shapes,
        blocks_problem=problem,
        head=head_group,
        tied_head=tied,
        embedding=embedding,
        biased=biased,
        biases=biases,
    )


def _check_supported(config: Any) -> None:
    rope = getattr(config, "rope_parameters", None) or {}
    layouts = rope.values() if rope and all(isinstance(value, dict) for value in rope.values()) else [rope]
    for layout in layouts:
        kind = layout.get("rope_type")
        if kind in _BATCH_DEPENDENT_ROPE:
            raise BaseModelError(
                f"base: rope_type {kind!r} makes a request's positions depend on the longest request of its "
                "batch; use a base with default, linear, yarn or llama3 rotary embeddings"
            )
    if getattr(config, "is_encoder_decoder", False):
        raise BaseModelError("base: an encoder-decoder cannot be served; use a decoder-only causal LM")


def _trace(model: nn.Module) -> tuple[list[Call], dict[nn.Module, AttentionSite]]:
    """The calls of all modules in a forward of two tokens, innermost first, and the attention among them."""
    calls: list[Call] = []
    handles = []
    for name, module in model.named_modules():

        def record(module: nn.Module, args: Any, kwargs: Any, output: Any, name: str = name) -> None:
            calls.append(Call(name, module, hidden_states(args, kwargs), output))

        handles.append(module.register_forward_hook(record, with_kwargs=True))
    device = next(model.parameters()).device
    previous = model.config._attn_implementation  # type: ignore[union-attr]
    model.set_attn_implementation(TRACE_NAME)  # type: ignore[operator]
    try:
        # Not in inference mode, where tensors do not say whether they were changed in place.
        with torch.no_grad(), trace_into() as sites, warnings.catch_warnings():
            ids = torch.zeros(1, 2, dtype=torch.long, device=device)
            model(input_ids=ids, position_ids=torch.arange(2, device=device)[None], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
        model.set_attn_implementation(previous)  # type: ignore[operator]
    if not sites:
        raise BaseModelError(
            f"base: {type(model).__name__} does not use transformers' attention interface, so its key-value "
            "cache cannot be paged; use a model that supports attn_implementation"
        )
    return calls, sites


def _groups(calls: Iterable[Call]) -> list[list[tuple[str, Linear]]]:
    """The linears among `calls`, in groups that were given the very same tensor."""
    groups: list[list[tuple[str, Linear]]] = []
    shared: torch.Tensor | None = None
    for call in calls:
        if not isinstance(call.module, Linear):
            continue
        if call.given is shared and groups:
            groups[-1].append((call.name, call.module))
        else:
            groups.append([(call.name, call.module)])
        shared = call.given
    return groups


def _biases(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name.removesuffix(".bias"): parameter.detach()
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if name.endswith(".bias")
    }


def _blocks(
    model: nn.Module, sites: dict[nn.Module, AttentionSite], calls: list[Call], state: StepState
) -> tuple[tuple[Block, ...], str]:
    try:
        return find_blocks(model, sites, calls, state), ""
    except BlocksNotFoundError as error:
        return (), f"{type(model).__name__}: {error}"


def _replace(model: nn.Module, members: list[tuple[str, Linear]], kernels: Kernels) -> ProjectionGroup:
    group = ProjectionGroup.build(members, kernels)
    for index, (name, _) in enumerate(members):
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, GroupedProjection(group, index))
    return group


def _eos_token_ids(model: nn.Module) -> frozenset[int]:
    generation = getattr(model, "generation_config", None)
    ids = getattr(generation, "eos_token_id", None)
    if ids is None:
        ids = getattr(model.config, "eos_token_id", None)
    if ids is None:
        return frozenset()
    return frozenset([ids] if isinstance(ids, int) else ids)
