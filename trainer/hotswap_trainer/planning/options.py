"""What a plan is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from hotswap_trainer.errors import OptionError

METHODS: Final = ("full", "lora", "qlora", "bottleneck", "prefix")
OPTIMIZERS: Final = ("adamw", "adamw8bit", "sgd")
DTYPES: Final = ("bf16", "fp32")
COMPLEXITIES: Final = ("simple", "moderate", "complex")


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """A plan's settings; sizes of adapters are those of `hotswap train`. `gpu` is in bytes.

    `rank` None is 8, 16 or 32, as the task is simple, moderate or complex; `context` None is 4096, or what
    the base has.
    """

    seq: int = 2048
    batch: int = 2
    tasks: int = 1
    complexity: str = "moderate"
    dtype: str = "bf16"
    optimizer: str = "adamw"
    methods: tuple[str, ...] = METHODS
    gpu: int | None = None
    context: int | None = None
    rank: int | None = None
    target_modules: str = "all-linear"
    bottleneck_size: int = 64
    num_virtual_tokens: int = 20

    def __post_init__(self) -> None:
        for name in ("seq", "batch", "tasks", "context", "rank", "bottleneck_size", "num_virtual_tokens"):
            value = getattr(self, name)
            least = 2 if name == "seq" else 1  # one token predicts nothing
            if value is not None and value < least:
                raise OptionError(f"{_flag(name)}: must be at least {least}, got {value}")
        for name, allowed in (
            ("complexity", COMPLEXITIES),
            ("dtype", DTYPES),
            ("optimizer", OPTIMIZERS),
        ):
            if getattr(self, name) not in allowed:
                raise OptionError(
                    f"{_flag(name)}: must be one of {', '.join(allowed)}; got {getattr(self, name)!r}"
                )
        unknown = [method for method in self.methods if method not in METHODS]
        if unknown or not self.methods:
            raise OptionError(
                f"--methods: must be some of {', '.join(METHODS)}; got {', '.join(unknown) or 'none'}"
            )
        if self.gpu is not None and self.gpu <= 0:
            raise OptionError(f"--gpu: must be over 0 bytes, got {self.gpu}")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
