"""Of what a comparison is, and where it was made: all that is needed to make it again."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence

from hotswap_client.cli.compare import general, units
from hotswap_client.cli.compare.options import CompareOptions
from hotswap_client.cli.compare.questions import Material
from hotswap_client.cli.compare.training import Base, Trained

_SHOWN = ("hotswap", "torch", "transformers", "peft")


def facts(
    options: CompareOptions, material: Material, base: Base, trained: Sequence[Trained]
) -> dict[str, str]:
    """By heading."""
    budget = options.budget
    length = f"{budget.max_steps} steps" if budget.max_steps is not None else f"{budget.epochs:g} epochs"
    measuring = options.measuring
    sizes = " and ".join(map(str, measuring.batch_sizes))
    rounds = "1 round" if measuring.rounds == 1 else f"{measuring.rounds} rounds"
    versions = trained[0].versions
    held = f", served in {options.quantize}" if options.quantize else ""

    def digest(value: str) -> str:
        return f"(sha256 {value[:12]})"

    return {
        "base": f"{base.spec}, {units.bytes_of(base.weight_bytes)} of weights{held} {digest(base.digest)}",
        "data": f"{material.title}, {material.num_train} examples {digest(material.train_digest)}",
        "questions": f"{len(material.questions)}, none of them trained on {digest(material.test_digest)}",
        "budget of each": f"{length}, batches of {budget.batch_size}, seed {options.seed}",
        "latency": f"{rounds}; {sizes} requests at once, {measuring.prompt_tokens} tokens "
        f"read and {measuring.new_tokens} written by each, every method beside the base in turn",
        "other text and knowledge": f"shipped {digest(general.digest())}",
        "machine": f"{os.cpu_count()} cores, {_processor()}",
        "versions": ", ".join(
            [f"Python {versions.get('python', platform.python_version())}"]
            + [f"{name} {versions[name]}" for name in _SHOWN if name in versions]
        ),
    }


def _processor() -> str:
    """The processor's model, as Linux tells it, else its kind."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.machine()
