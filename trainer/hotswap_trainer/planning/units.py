"""Amounts as users write them: memory such as `24GB`, model sizes such as `7b`."""

from __future__ import annotations

import math
import re

from hotswap_trainer.errors import OptionError

GIB = 1024**3

_MEMORY = re.compile(r"(\d+(?:\.\d+)?|\.\d+)\s*(gb|gib|g|mb|mib|m)?", re.IGNORECASE)
_SIZE = re.compile(r"(\d+(?:\.\d+)?|\.\d+)\s*([bm])", re.IGNORECASE)


def parse_memory(text: str, option: str) -> int:
    """Bytes of `24GB`, `24GiB`, `24` or `24576MB`.

    GB means 1024³ bytes, as for cards: what is sold as 24 GB holds 24 GiB.

    Raises:
        OptionError: it is no amount of memory, or none at all.
    """
    match = _MEMORY.fullmatch(text.strip())
    amount = float(match[1]) if match else math.nan
    if match is None or not 0 < amount < math.inf:
        raise OptionError(f"{option}: must be an amount of memory over 0, such as 24GB, got {text!r}")
    unit = GIB if (match[2] or "g").lower().startswith("g") else 1024**2
    return round(amount * unit)


def parse_size(text: str) -> float | None:
    """Billions of parameters of `7b`, `0.5B` or `135m`; None of what is no size.

    Raises:
        OptionError: the size is 0.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        return None
    billions = float(match[1]) / (1.0 if match[2].lower() == "b" else 1000.0)
    if billions == 0:
        raise OptionError(f"--base: a model of {text} has no parameters; give a size such as 7b")
    return billions


def show_bytes(count: float) -> str:
    """`count` bytes for people, in three digits: `1.25 GiB`, `850 MiB`, `12.0 KiB`."""
    unit, size = next(
        ((unit, size) for unit, size in (("GiB", GIB), ("MiB", 1024**2)) if count >= size), ("KiB", 1024)
    )
    value = count / size
    return f"{value:,.{2 if value < 10 else 1 if value < 100 else 0}f} {unit}"
