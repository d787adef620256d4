"""Training with `--fsdp`: when it can be had, and the trained weights out of the processes' shards.

FSDP2 (`torch.distributed.fsdp.fully_shard`), which transformers' Trainer leaves to accelerate.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from hotswap_trainer.config import TrainOptions
from hotswap_trainer.errors import OptionError

if TYPE_CHECKING:
    from torch import Tensor, nn

_METHODS = ("full", "lora")
_LAUNCHED = {
    "ACCELERATE_USE_FSDP": "FSDP is switched on by --fsdp, not by accelerate's configuration",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed is not supported; use --fsdp",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM is not supported; use --fsdp",
}
_HOW = "torchrun --nproc-per-node N -m hotswap_trainer, or accelerate launch -m hotswap_trainer"


def check_processes(options: TrainOptions) -> None:
    """Refuse what the processes that were started cannot do together.

    Raises:
        OptionError: names the flag and the remedy.
    """
    import torch

    for variable, remedy in _LAUNCHED.items():
        if os.environ.get(variable, "").lower() in ("true", "1"):
            raise OptionError(f"accelerate launch: {remedy} ({variable} is set)")
    if not options.fsdp:
        return
    if options.method not in _METHODS:
        raise OptionError(
            f"--fsdp: shards the methods {' and '.join(_METHODS)}, not {options.method}; leave it out: each "
            "process then holds the whole model"
        )
    if options.device == "cpu" or not torch.cuda.is_available():
        raise OptionError(
            "--fsdp: needs GPUs, as accelerate shards nothing on CPUs; leave it out: each process then holds "
            "the whole model"
        )
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        raise OptionError(f"--fsdp: one process has nothing to share; start several: {_HOW}")


def gather(model: nn.Module, *, keep: bool) -> dict[str, Tensor]:
    """The trained parameters, whole, in the CPU's memory; none where they are not to be kept.

    Every process has to call it, as the shards of all make a whole.
    """
    from torch.distributed.tensor import DTensor

    whole: dict[str, Any] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            value = parameter.detach()
            value = value.full_tensor() if isinstance(value, DTensor) else value
            if keep:
                whole[name] = value.cpu().contiguous()
    return whole


def restore(model: nn.Module, whole: dict[str, Tensor]) -> None:
    """Put what `gather` gave into the trained parameters, of which each process may hold a shard."""
    import torch
    from torch.distributed.tensor import DTensor, distribute_tensor

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            value = whole[name]
            if isinstance(parameter, DTensor):
                value = distribute_tensor(
                    value.to(parameter.device), parameter.device_mesh, parameter.placements
                )
            parameter.copy_(value)
