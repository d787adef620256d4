"""What steps, loads and swaps cost on one machine, as `hotswap bench --costs` measured it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from hotswap_server.fleet.options import FleetError

FORMAT: Final = "hotswap-costs/1"


@dataclass(frozen=True, slots=True)
class StepCosts:
    """Seconds of a step: a piecewise linear function of all its tokens, and what is linear.

    `seconds[i]` belongs to a step of `tokens[i]` tokens; past the last the last slope goes on. `per_row` is
    for each sequence that gets a token, `per_adapter` for each distinct adapter, `per_context_token` for
    each token before those that are decoded, `per_prompt_pair` for each pair of a prompt's token and one
    before it. `noise` holds evenly spaced quantiles of measured over fitted time, by which every step is
    multiplied at random.
    """

    tokens: tuple[int, ...]
    seconds: tuple[float, ...]
    per_row: float = 0.0
    per_adapter: float = 0.0
    per_context_token: float = 0.0
    per_prompt_pair: float = 0.0
    noise: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        if not self.tokens or len(self.tokens) != len(self.seconds):
            raise FleetError("step.tokens", "must have as many entries as step.seconds, and at least one")
        if any(b <= a for a, b in zip((0, *self.tokens), self.tokens, strict=False)):
            raise FleetError("step.tokens", f"must grow from 1 or more, got {list(self.tokens)}")
        for name in ("per_row", "per_adapter", "per_context_token", "per_prompt_pair"):
            _require_cost(f"step.{name}", getattr(self, name))
        for name in ("seconds", "noise"):
            for value in getattr(self, name):
                _require_cost(f"step.{name}", value)
        if self.seconds[0] <= 0 or any(b < a for a, b in zip(self.seconds, self.seconds[1:], strict=False)):
            raise FleetError("step.seconds", "must be over 0 and never fall as tokens grow")
        if not self.noise or sum(self.noise) == 0:
            raise FleetError("step.noise", "must hold at least one number over 0; [1.0] is no noise")

    def table(self, max_tokens: int) -> list[float]:
        """The part that depends on tokens alone, of 0 to `max_tokens` of them."""
        found: Any = np.interp(np.arange(max_tokens + 1), self.tokens, self.seconds)
        if len(self.tokens) > 1 and max_tokens > self.tokens[-1]:
            slope = (self.seconds[-1] - self.seconds[-2]) / (self.tokens[-1] - self.tokens[-2])
            past = np.arange(1, max_tokens - self.tokens[-1] + 1)
            found[self.tokens[-1] + 1 :] = self.seconds[-1] + slope * past
        return [float(value) for value in found]

    def time(self, tokens: int, rows: int, adapters: int, context: float, pairs: float) -> float:
        """Seconds of one step, without noise; what the simulation computes step by step."""
        return (
            self.table(tokens)[tokens]
            + self.per_row * rows
            + self.per_adapter * adapters
            + self.per_context_token * context
            + self.per_prompt_pair * pairs
        )


@dataclass(frozen=True, slots=True)
class Costs:
    """`call_seconds` of a call are spent outside steps; `load_seconds` from store to host memory, and
    `swap_seconds` from there to a slot, of an adapter of `adapter_bytes`. `about` tells where and how that
    was measured."""

    step: StepCosts
    call_seconds: float
    load_seconds: float
    swap_seconds: float
    adapter_bytes: int
    about: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("call_seconds", "load_seconds", "swap_seconds"):
            _require_cost(name, getattr(self, name))
        if not isinstance(self.adapter_bytes, int) or self.adapter_bytes < 1:
            raise FleetError("adapter_bytes", f"must be a whole number over 0, got {self.adapter_bytes!r}")

    @property
    def prefill_tokens_per_second(self) -> float:
        """Of a lone prompt that fills the largest step that was measured."""
        tokens = self.step.tokens[-1]
        return tokens / self.step.time(tokens, 1, 1, 0, tokens * tokens / 2)

    def write(self, path: Path) -> None:
        path.write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Costs:
        """The costs in a file.

        Raises:
            FleetError: it cannot be read, or is not what `hotswap bench --costs` writes.
        """
        remedy = "measure them with `hotswap bench --costs FILE`"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise FleetError("costs", f"{path} cannot be read: {error.strerror}; {remedy}") from None
        except ValueError:
            raise FleetError("costs", f"{path} is not JSON; {remedy}") from None
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise FleetError("costs", f"{path} is not in the format {FORMAT}; {remedy}")
        del content["format"]
        try:
            step = content.pop("step")
            lists: dict[str, Any] = {
                name: tuple(step.pop(name)) for name in ("tokens", "seconds", "noise") if name in step
            }
            return cls(step=StepCosts(**lists, **step), **content)
        except FleetError as error:
            raise FleetError("costs", f"{path}: {error}; {remedy}") from None
        except (TypeError, KeyError, AttributeError) as error:
            raise FleetError(
                "costs", f"{path}: a field is missing, unknown or of the wrong type ({error}); {remedy}"
            ) from None


def _require_cost(name: str, value: Any) -> None:
    sound = isinstance(value, int | float) and not isinstance(value, bool)
    if not sound or not math.isfinite(value) or value < 0:
        raise FleetError(name, f"must be a finite number, 0 or more, got {value!r}")
