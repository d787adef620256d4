"""Numbers as people read them."""

from __future__ import annotations


def bytes_of(count: float) -> str:
    """`1.23 GB`, in decimal units with three digits."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"


def share(value: float) -> str:
    return f"{value:.0%}"


def signed_share(value: float) -> str:
    """`+12%`; nothing is `0%`."""
    text = f"{value:+.0%}"
    return "0%" if text in ("+0%", "-0%") else text.replace("-", "\N{MINUS SIGN}")


def signed(value: float, digits: int = 3) -> str:
    text = f"{value:+.{digits}f}"
    return text.lstrip("+-") if float(text) == 0 else text.replace("-", "\N{MINUS SIGN}")


def milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.0f}" if seconds >= 0.1 else f"{1000 * seconds:.1f}"


def percent(value: float) -> str:
    """Of parameters: `0.73%`, `100%`."""
    return f"{value:.0f}%" if value >= 99.95 else f"{value:.2g}%" if value < 0.1 else f"{value:.2f}%"


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.0f} s"
