"""A training step without memory or arithmetic, which tells what a real one holds.

The base is made from its configuration on the meta device, the adapter is attached by the trainer's own
method, and a forward and a backward run through both, on fake tensors: the meta device's, posing as a CPU's.
So there is no formula of a layer here to be wrong about: what autograd saves is counted as it saves it.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from hotswap_trainer import methods
from hotswap_trainer.planning.four_bit import FourBitLinear, quantise
from hotswap_trainer.planning.live import LiveBytes
from hotswap_trainer.planning.options import PlanOptions

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

# bitsandbytes' 8-bit optimisers: smaller parameters have 32-bit states, others a scale for so many numbers.
_SMALL_PARAMETER = 4096
_STATES_BLOCK = 256


@dataclass(frozen=True, slots=True)
class Step:
    """What a step of a method holds, in bytes.

    `activations` is the most of them at once, with the loss's and the temporaries; `peak` the most of
    everything at once, at most the sum: gradients come as activations go.
    """

    num_trained: int
    weights: int
    constants: int
    gradients: int
    optimizer: int
    activations: int
    peak: int


def simulate(config: Any, method: str, options: PlanOptions, *, rank: int, checkpointing: bool) -> Step:
    """A step of `hotswap train --method …` on full sequences with a label at every token.

    In bf16 full fine-tuning has float32 weights and computes by autocast, as in the trainer.

    Raises:
        OptionError: the method's options do not fit the base.
    """
    with _quiet(), _unpacked():
        with torch.device("meta"):
            model = build(config, method, options, rank=rank, checkpointing=checkpointing)
        with FakeTensorMode(allow_non_fake_inputs=True):  # PEFT keeps a few tensors out of modules
            _pretend_to_be_on_cpu(model)
            return measure(model, options)


def _pretend_to_be_on_cpu(model: nn.Module) -> None:
    """Put fake tensors for the meta device's, which has no autocast and whose attention keeps all scores."""
    made: dict[int, torch.Tensor] = {}
    for module in model.modules():
        places: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for tensors in places:
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype)
                    trained = tensor.requires_grad
                    made[id(tensor)] = nn.Parameter(fake, trained) if tensors is module._parameters else fake
                tensors[name] = made[id(tensor)]  # tied ones stay so


def measure(model: Any, options: PlanOptions) -> Step:
    """A forward and a backward through a model to train, of fake tensors or real ones, counted."""
    trained = [p for p in model.parameters() if p.requires_grad]
    held = [*model.parameters(), *model.buffers()]
    gradients = sum(p.nbytes for p in trained)
    states = _optimizer_bytes(model, trained, options.optimizer)
    weights = sum(tensor.nbytes for tensor in held)
    constants = sum(m.constants for m in model.modules() if isinstance(m, FourBitLinear))
    live = LiveBytes(held)
    for parameter in trained:
        parameter.register_post_accumulate_grad_hook(live.count_gradient)
    with live:
        _forward_backward(model, options)
    fixed = weights + constants + states
    return Step(
        sum(p.numel() for p in trained),
        weights,
        constants,
        gradients,
        states,
        live.peak_activations,
        fixed + max(live.peak, gradients),
    )


def fake_base(config: Any, dtype: str) -> Any:
    """The base as it is served, on the meta device."""
    with torch.device("meta"), _quiet():
        return _from_config(config, DTYPES[dtype])


def _from_config(config: Any, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    # A model writes into its configuration.
    return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)  # type: ignore[no-untyped-call]


def build(config: Any, method: str, options: PlanOptions, *, rank: int, checkpointing: bool) -> Any:
    """The model that the trainer would train, of random weights; a 4-bit base by its stand-in."""
    chosen = methods.available()[method]
    method_options = method_options_of(method, options, rank)
    model = _from_config(config, torch.float32 if method == "full" else DTYPES[options.dtype])
    model.config.use_cache = False
    if method == "qlora":
        quantise(model)
    if checkpointing:
        model.enable_input_require_grads()
    model = chosen.attach(model, method_options)
    if checkpointing:
        # The state of random numbers is a few KiB, and real: fake tensors cannot have it restored.
        arguments = {"use_reentrant": False, "preserve_rng_state": False}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=arguments)
    return model.train()


def method_options_of(method: str, options: PlanOptions, rank: int) -> Any:
    """The options of `hotswap train` that the plan's stand for."""
    make = methods.available()[method].options
    if method in ("lora", "qlora"):
        return make(rank=rank, target_modules=options.target_modules)
    if method == "bottleneck":
        return make(bottleneck_size=options.bottleneck_size)
    if method == "prefix":
        return make(num_virtual_tokens=options.num_virtual_tokens)
    return make()


def _forward_backward(model: nn.Module, options: PlanOptions) -> None:
    """The trainer's loss (`batching.completion_loss`) where each token but the first has a label."""
    base: Any = getattr(model, "get_base_model", lambda: model)()
    kept = options.seq - 1
    ids = torch.zeros(options.batch, options.seq, dtype=torch.long)
    positions = (
        {"logits_to_keep": torch.arange(kept)}
        if "logits_to_keep" in inspect.signature(base.forward).parameters
        else {}
    )
    autocast = torch.autocast("cpu", dtype=torch.bfloat16) if options.dtype == "bf16" else nullcontext()
    with autocast:
        logits = model(input_ids=ids, **positions).logits
    loss = nn.functional.cross_entropy(
        logits[:, :kept].float().flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"
    )
    del logits
    loss.backward()  # type: ignore[no-untyped-call]


def _optimizer_bytes(model: nn.Module, trained: list[nn.Parameter], optimizer: str) -> int:
    """AdamW keeps two numbers per parameter, of its type. SGD, without momentum, keeps none.

    In 8 bits the embeddings' stay in 32, as transformers' Trainer arranges it.
    """
    if optimizer == "sgd":
        return 0
    if optimizer == "adamw":
        return sum(2 * p.nbytes for p in trained)
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    return sum(
        8 * p.numel()
        if id(p) in embeddings or p.numel() < _SMALL_PARAMETER
        else 2 * (p.numel() + 4 * -(-p.numel() // _STATES_BLOCK))
        for p in trained
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what the libraries say about real runs out of the plan."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"(torch|transformers|peft)\b")
            yield
    finally:
        logging.set_verbosity(verbosity)


@contextmanager
def _unpacked() -> Iterator[None]:
    """Tell transformers that no row holds several sequences, which it cannot ask of fake tensors."""
    from transformers import masking_utils

    ask = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = ask
