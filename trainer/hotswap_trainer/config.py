"""The options of a run that do not depend on the method, and how flags and YAML become a checked run."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hotswap.names import AdapterName, InvalidAdapterNameError

from hotswap_trainer import methods
from hotswap_trainer.errors import OptionError
from hotswap_trainer.method import Method
from hotswap_trainer.options import build, merge, option, read_yaml, specs

if TYPE_CHECKING:
    import torch

RUN, DATA, OPTIMISATION, CADENCE = "Run", "Data", "Optimisation", "Hardware, checkpoints and logs"


@dataclass(frozen=True, slots=True)
class TrainOptions:
    """Everything about a run but its method's own options.

    Raises:
        OptionError: a value is out of range; the message names the flag.
    """

    data: Path = option(help="JSONL file: prompt+completion, messages, or text on each line.", group=RUN)
    name: str = option(help="The adapter's name: tenant/task.", group=RUN)
    output: Path | str = option(
        help="The store, a directory or a URL such as s3://…; the result becomes a new version in it.",
        group=RUN,
    )
    method: str = option("lora", help="How the adapter changes the base.", group=RUN)
    base: str = option("smollm2", help="A transformers directory, a hub id, or smollm2.", group=RUN)
    seed: int = option(0, help="Seed of the split, the order, the initial weights and dropout.", group=RUN)

    eval_data: Path | None = option(
        None, help="JSONL file to evaluate on, instead of a part of --data.", group=DATA
    )
    eval_fraction: float = option(0.1, help="Part of --data to hold out; 0 evaluates nothing.", group=DATA)
    max_length: int = option(1024, help="Tokens of an example; see --overlong.", group=DATA)
    overlong: Literal["truncate", "drop"] = option(
        "truncate", help="What happens to longer examples: cut at the end, or left out.", group=DATA
    )
    group_by_length: bool = option(True, help="Batch examples of like length: less padding.", group=DATA)

    epochs: float = option(3.0, help="Passes over the data.", group=OPTIMISATION)
    max_steps: int | None = option(None, help="Optimiser steps, instead of --epochs.", group=OPTIMISATION)
    batch_size: int = option(4, help="Examples per process and step.", group=OPTIMISATION)
    accumulation: int = option(1, help="Batches whose gradients make one step.", group=OPTIMISATION)
    learning_rate: float | None = option(
        None, help="Peak learning rate; by default the method's.", short="--lr", group=OPTIMISATION
    )
    scheduler: Literal["cosine", "linear", "constant"] = option(
        "cosine", help="How the rate goes on after the warmup.", group=OPTIMISATION
    )
    warmup: float = option(0.05, help="Part of the steps in which the rate rises.", group=OPTIMISATION)
    weight_decay: float = option(0.0, help="AdamW's weight decay.", group=OPTIMISATION)
    max_grad_norm: float = option(
        1.0, help="Gradients are clipped to this norm; 0: never.", group=OPTIMISATION
    )

    device: Literal["auto", "cpu"] = option("auto", help="cpu leaves a GPU unused.", group=CADENCE)
    dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto", help="Of the base: bfloat16 on a GPU that has it, else float32.", group=CADENCE
    )
    fsdp: bool = option(
        False,
        help="Shard weights, gradients and optimiser over the processes' GPUs (FSDP), for lora and full.",
        group=CADENCE,
    )
    gradient_checkpointing: bool = option(
        False, help="Recompute activations: less memory, a third more time.", group=CADENCE
    )
    eval_every: int | None = option(
        None, help="Steps between evaluations; by default five in a run.", group=CADENCE
    )
    save_every: int | None = option(
        None, help="Steps between checkpoints; by default twenty in a run, at least 10 steps.", group=CADENCE
    )
    log_every: int | None = option(
        None, help="Steps between points of the loss curve; by default at most 200.", group=CADENCE
    )
    resume: bool = option(True, help="Go on from an interrupted run of the same options.", group=CADENCE)
    work_dir: Path | None = option(
        None, help="Where checkpoints go; by default the user's cache.", group=CADENCE
    )

    def __post_init__(self) -> None:
        def require(ok: bool, name: str, rule: str) -> None:
            if not ok:
                flag = "--" + name.replace("_", "-")
                raise OptionError(f"{flag}: must be {rule}, got {getattr(self, name)}")

        def positive(name: str) -> None:
            value = getattr(self, name)
            require(value is None or (math.isfinite(value) and value > 0), name, "over 0")

        for name in ("max_steps", "batch_size", "accumulation", "learning_rate", "epochs"):
            positive(name)
        for name in ("eval_every", "save_every", "log_every"):
            positive(name)
        require(self.max_length >= 2, "max_length", "at least 2")
        require(0 <= self.eval_fraction < 1, "eval_fraction", "at least 0 and under 1")
        require(0 <= self.warmup <= 1, "warmup", "between 0 and 1")
        require(0 <= self.weight_decay < math.inf, "weight_decay", "0 or more")
        require(0 <= self.max_grad_norm < math.inf, "max_grad_norm", "0 (never) or more")
        require(0 <= self.seed < 2**32, "seed", "between 0 and 2**32-1")
        try:
            AdapterName.parse(self.name)
        except InvalidAdapterNameError as error:
            raise OptionError(f"--name: {error}") from error


@dataclass(frozen=True, slots=True)
class Run:
    """A run that is ready to start."""

    options: TrainOptions
    method: Method[Any]
    method_options: Any

    @property
    def name(self) -> AdapterName:
        return AdapterName.parse(self.options.name)

    @property
    def learning_rate(self) -> float:
        return self.options.learning_rate or self.method.learning_rate


def configure(flags: Mapping[str, Any], config: Path | None = None) -> Run:
    """A run from flags (None where not given), then a YAML file, then defaults.

    Raises:
        OptionError: an unknown key, a method that does not exist, an option of another method, a bad value.
    """
    available = methods.available()
    values = merge(
        _spelled_out(flags, available), _spelled_out(read_yaml(config) if config else {}, available)
    )
    method_name = values.get("method") or "lora"
    if method_name not in available:
        raise OptionError(f"--method: must be one of {', '.join(available)}; got {method_name!r}")
    method = available[method_name]
    _refuse_unknown(values, method, available)
    run = Run(build(TrainOptions, values), method, build(method.options, values))
    method.check(run.options, run.method_options)
    return run


def compute_dtype(options: TrainOptions) -> torch.dtype:
    """The type that a run on this machine computes in."""
    import torch

    wanted = options.dtype
    if wanted == "auto":
        on_gpu = options.device == "auto" and torch.cuda.is_available()
        wanted = "bfloat16" if on_gpu and torch.cuda.is_bf16_supported() else "float32"
    return torch.bfloat16 if wanted == "bfloat16" else torch.float32


def _spelled_out(values: Mapping[str, Any], available: Mapping[str, Method[Any]]) -> dict[str, Any]:
    """`values` with second spellings of options (`lr`) replaced by their names."""
    classes: list[type] = [TrainOptions, *(method.options for method in available.values())]
    names = {
        spec.short.lstrip("-"): spec.name for options in classes for spec in specs(options) if spec.short
    }
    return {names.get(key, key): value for key, value in values.items()}


def _refuse_unknown(
    values: Mapping[str, Any], method: Method[Any], available: Mapping[str, Method[Any]]
) -> None:
    common = {field.name for field in dataclasses.fields(TrainOptions)}
    own = {spec.name for spec in specs(method.options)}
    for key in values:
        if key in common | own:
            continue
        owners = [name for name, other in available.items() if key in {s.name for s in specs(other.options)}]
        if owners:
            raise OptionError(
                f"--{key.replace('_', '-')}: belongs to method {' and '.join(owners)}, not to {method.name}"
            )
        close = difflib.get_close_matches(key, sorted(common | own), n=1)
        hint = f"; did you mean {close[0]}?" if close else "; `hotswap train --help` lists the options"
        raise OptionError(f"--config: unknown key {key}{hint}")
