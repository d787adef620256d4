"""Memory of common GPUs, and which of them holds what a method needs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from hotswap_trainer.errors import OptionError
from hotswap_trainer.planning.units import GIB, parse_memory


@dataclass(frozen=True, slots=True)
class Gpu:
    """One kind of card; `mebibytes` is its memory as the driver reports it, error correction on."""

    name: str
    mebibytes: int

    @property
    def memory(self) -> int:
        """Bytes."""
        return self.mebibytes * 1024**2


GPUS: Final = (
    Gpu("RTX 3060", 12288),
    Gpu("T4", 15360),
    Gpu("RTX 4080", 16376),
    Gpu("L4", 23034),
    Gpu("RTX 4090", 24564),
    Gpu("RTX 5090", 32607),
    Gpu("A100 40GB", 40960),
    Gpu("L40S", 46068),
    Gpu("RTX A6000", 49140),
    Gpu("H100 80GB", 81559),
    Gpu("A100 80GB", 81920),
    Gpu("H200", 143771),
    Gpu("B200", 183359),
)
"""By memory."""

OVERHEAD_BYTES: Final = GIB * 3 // 4
"""What a process takes of a GPU beside tensors: the CUDA context, the libraries' workspaces."""

_SLACK: Final = 1.05  # an allocator cannot use every gap


def required(peak: float) -> int:
    """Memory in bytes that a GPU must have for tensors of `peak` bytes."""
    return math.ceil(peak * _SLACK) + OVERHEAD_BYTES


def smallest(peak: float) -> Gpu | None:
    """The card with the least memory that holds `peak` bytes of tensors; None where it takes several."""
    return next((gpu for gpu in GPUS if gpu.memory >= required(peak)), None)


def parse_gpu(text: str) -> int:
    """Memory in bytes of `24GB` or of a card in `GPUS` by name (`h100`, `rtx4090`).

    Raises:
        OptionError: it is neither.
    """
    wanted = _letters(text)
    for gpu in GPUS if wanted else ():
        if wanted in (_letters(gpu.name), _letters(gpu.name).removesuffix("gb")):
            return gpu.memory
    families = [gpu for gpu in GPUS if wanted and _letters(gpu.name).startswith(wanted)]
    if len(families) == 1:
        return families[0].memory
    if len(families) > 1 and not wanted.isdigit():
        names = ", ".join(gpu.name for gpu in families)
        raise OptionError(f"--gpu: {text} may be any of {names}; say which, or give its memory")
    try:
        return parse_memory(text, "--gpu")
    except OptionError:
        names = ", ".join(gpu.name for gpu in GPUS)
        raise OptionError(
            f"--gpu: must be an amount of memory over 0, such as 24GB, or one of {names}; got {text!r}"
        ) from None


def _letters(text: str) -> str:
    return "".join(filter(str.isalnum, text.lower()))
