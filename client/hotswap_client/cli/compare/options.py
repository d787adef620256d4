"""What a comparison is of: methods with their settings, budget, and the limits that its advice keeps."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

PRESETS: Mapping[str, Mapping[str, str]] = {
    "lora": {"learning_rate": "1e-3", "rank": "16"},
    "qlora": {"learning_rate": "1e-3", "rank": "16"},
    "bottleneck": {"learning_rate": "1e-3", "bottleneck_size": "64"},
    "prefix": {"learning_rate": "1.5e-2", "num_virtual_tokens": "20"},
    "ia3": {"learning_rate": "1e-2"},
    "full": {"learning_rate": "5e-5"},
}
"""Options of `hotswap train` by method. Runs of about a hundred steps want higher rates than its defaults."""

QUICK_METHODS = ("lora", "bottleneck", "prefix")
SHARED = ("data", "base", "name", "output", "method", "seed", "epochs", "max_steps", "batch_size")
"""Options of `hotswap train` that are the same for all methods, or ours to choose."""

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class CompareError(Exception):
    """The comparison cannot be made. The message is one line that names the option and the remedy."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a recommended method must keep: a share of the base's time between tokens, and bytes."""

    latency_overhead: float | None = None
    checkpoint: int | None = None
    memory: int | None = None


@dataclass(frozen=True, slots=True)
class Budget:
    """What each method may spend on training. `max_steps` takes the place of `epochs`."""

    epochs: float = 1.5
    max_steps: int | None = None
    batch_size: int = 8

    def __post_init__(self) -> None:
        if not 0 < self.epochs < math.inf:
            raise CompareError(f"--epochs: must be over 0, got {self.epochs}")
        for flag, value in (("--max-steps", self.max_steps), ("--batch-size", self.batch_size)):
            if value is not None and value < 1:
                raise CompareError(f"{flag}: must be at least 1, got {value}")

    def training(self) -> dict[str, str]:
        """Options of `hotswap train`."""
        length = (
            {"epochs": str(self.epochs)} if self.max_steps is None else {"max_steps": str(self.max_steps)}
        )
        return {**length, "batch_size": str(self.batch_size)}


@dataclass(frozen=True, slots=True)
class Measuring:
    """How much is measured: rounds of latency, tokens of a request in them, and how many questions."""

    rounds: int = 6
    prompt_tokens: int = 64
    new_tokens: int = 32
    batch_sizes: tuple[int, ...] = (1, 8)
    max_questions: int | None = None
    knowledge_step: int = 1
    """Every how manieth item of the general knowledge is asked."""

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise CompareError(f"--rounds: must be at least 1, got {self.rounds}")


@dataclass(frozen=True, slots=True)
class CompareOptions:
    """A whole comparison. `settings` holds options of `hotswap train` by method."""

    base: str = "smollm2"
    data: str = "demo"
    test_data: Path | None = None
    test_fraction: float = 0.2
    settings: Mapping[str, Mapping[str, str]] = field(default_factory=lambda: PRESETS)
    budget: Budget = field(default_factory=Budget)
    measuring: Measuring = field(default_factory=Measuring)
    seed: int = 0
    quantize: str | None = None
    limits: Limits = field(default_factory=Limits)
    output: Path = Path("compare-report")
    store: Path = Path("compare-store")
    fresh: bool = False
    remeasure: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.test_fraction < 1:
            raise CompareError(f"--test-fraction: must be over 0 and under 1, got {self.test_fraction}")
        if self.quantize not in (None, "nf4", "fp4", "int8"):
            raise CompareError(f"--quantize: must be nf4, fp4 or int8, got {self.quantize}")
        if not 0 <= self.seed < 2**32:
            raise CompareError(f"--seed: must be between 0 and 2**32-1, got {self.seed}")

    @property
    def methods(self) -> tuple[str, ...]:
        return tuple(self.settings)

    def training(self, method: str) -> dict[str, str]:
        """Options of `hotswap train` for a method, but for those that say where."""
        own = self.settings[method]
        return {
            "method": method,
            "seed": str(self.seed),
            "eval_fraction": "0",
            **self.budget.training(),
            **own,
        }


def method_settings(methods: str, changes: Sequence[str]) -> dict[str, dict[str, str]]:
    """The settings of the methods in a list such as `lora,prefix`, changed by `METHOD.OPTION=VALUE`.

    Raises:
        CompareError: an unknown or repeated method, or a change that is none.
    """
    names = [name.strip() for name in methods.split(",") if name.strip()]
    if not names:
        raise CompareError(f"--methods: name at least one of {', '.join(PRESETS)}")
    for name in names:
        if name not in PRESETS:
            close = difflib.get_close_matches(name, PRESETS, n=1)
            remedy = f"did you mean {close[0]}?" if close else f"choose from {', '.join(PRESETS)}"
            raise CompareError(f"--methods: there is no method {name!r}; {remedy}")
    if len(set(names)) < len(names):
        raise CompareError(f"--methods: {methods} names a method twice")
    settings = {name: dict(PRESETS[name]) for name in names}
    for change in changes:
        match = re.fullmatch(r"(\w+)\.([\w-]+)=(.+)", change)
        if match is None:
            raise CompareError(f"--set: must be METHOD.OPTION=VALUE, such as lora.rank=8, got {change!r}")
        method, key, value = match[1], match[2].replace("-", "_"), match[3]
        if method not in settings:
            raise CompareError(f"--set: {change} is of no compared method; --methods has {', '.join(names)}")
        if key in SHARED:
            raise CompareError(
                f"--set: {change} would not compare like with like; use --{key.replace('_', '-')}"
            )
        settings[method][key] = value
    return settings


def parse_bytes(flag: str, text: str | None) -> int | None:
    """Bytes of `50MB`, `1.5GiB` or `4096`; None where there is no limit.

    Raises:
        CompareError: it is no positive size.
    """
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
    if match is None or (match[3] and not match[2]) or float(match[1]) == 0:
        raise CompareError(f"{flag}: must be a size such as 50MB or 1.5GiB, got {text!r}")
    unit = match[2].upper()
    return round(float(match[1]) * (_BINARY_UNITS[unit] if match[3] else _UNITS[unit]))


def parse_share(flag: str, text: str | None) -> float | None:
    """0.1 for `10%` or `0.1`; None where there is no limit.

    Raises:
        CompareError: it is no share, or one over 1 without a `%`, which may be meant as per cent.
    """
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(%?)", text.strip())
    if match is None:
        raise CompareError(f"{flag}: must be a share such as 10% or 0.1, got {text!r}")
    value = float(match[1]) / (100 if match[2] else 1)
    if not match[2] and value > 1:
        raise CompareError(f"{flag}: {text} is over 1; write {text}% if you mean per cent")
    return value
