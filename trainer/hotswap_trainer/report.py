"""What is written beside the weights: `training.json`, the model card and the loss curve."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hotswap_trainer.options import as_json
from hotswap_trainer.plot import plot_losses

if TYPE_CHECKING:
    from hotswap_trainer.config import Run
    from hotswap_trainer.data import Dataset
    from hotswap_trainer.loop import Outcome

_PACKAGES = (
    "hotswap",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "bitsandbytes",
    "safetensors",
    "tokenizers",
    "numpy",
)


@dataclass(frozen=True, slots=True)
class Parameters:
    """How many parameters a model has, and how many of them were trained."""

    trainable: int
    total: int

    @property
    def percent(self) -> float:
        return 100 * self.trainable / self.total


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that is known about a finished run."""

    run: Run
    parameters: Parameters
    data: Dataset
    eval_data: Dataset | None
    num_train: int
    num_eval: int
    outcome: Outcome

    def write(self, directory: Path) -> None:
        """Write `training.json`, `README.md` and `loss.png` into `directory`."""
        (directory / "training.json").write_text(json.dumps(self.as_json(), indent=2) + "\n", "utf-8")
        (directory / "README.md").write_text(self._card(), "utf-8")
        plot_losses(self.outcome.history, directory / "loss.png", title=str(self.run.name))

    def as_json(self) -> dict[str, Any]:
        """The content of `training.json`."""
        options, outcome = self.run.options, self.outcome
        return {
            "name": options.name,
            "method": self.run.method.name,
            "base": options.base,
            "seed": options.seed,
            "parameters": {**asdict(self.parameters), "percent": self.parameters.percent},
            "data": {
                "sha256": self.data.digest,
                "eval_sha256": self.eval_data.digest if self.eval_data else None,
                "train_examples": self.num_train,
                "eval_examples": self.num_eval,
                "truncated_examples": self.data.num_truncated,
                "dropped_examples": self.data.num_dropped,
            },
            "steps": outcome.num_steps,
            "processes": outcome.num_processes,
            "wall_seconds": round(outcome.seconds, 3),
            "peak_memory_bytes": outcome.peak_memory,
            "loss": {
                "train": outcome.final("train"),
                "eval": outcome.final("eval"),
                "history": [asdict(point) for point in outcome.history],
            },
            "options": {**as_json(options), "learning_rate": self.run.learning_rate},
            "method_options": as_json(self.run.method_options),
            "versions": {"python": platform.python_version(), **_versions()},
        }

    def _card(self) -> str:
        options, outcome, method = self.run.options, self.outcome, self.run.method
        batch = options.batch_size * options.accumulation * outcome.num_processes
        settings = {
            "trainable parameters": f"{self.parameters.trainable:,} ({self.parameters.percent:.2f}%)",
            "examples": f"{self.num_train} trained on, {self.num_eval} held out",
            "steps": f"{outcome.num_steps} of {batch} examples",
            "learning rate": f"{self.run.learning_rate:g}, {options.scheduler}",
            "seed": options.seed,
            "time": f"{outcome.seconds:.0f} s",
            **{
                f"`{key}`": value
                for key, value in as_json(self.run.method_options).items()
                if value is not None
            },
        }
        placeholders = replace(options, output=Path("STORE"))
        made = "An adapter" if method.result == "adapter" else "A model made"
        loading = method.loading().replace("\n", "\n    ")
        losses = [(kind, outcome.final(kind)) for kind in ("train", "eval")]
        rows = "\n".join(f"| {key} | {value} |" for key, value in settings.items())
        rows += "".join(f"\n| final {kind} loss | {loss:.4f} |" for kind, loss in losses if loss is not None)
        return f"""---
base_model: {json.dumps(options.base)}
library_name: {method.library}
pipeline_tag: text-generation
tags: [hotswap, {method.name}]
---

# {options.name}

{made} of `{options.base}`, trained with hotswap by the method `{method.name}` ({method.summary}).

| | |
| --- | --- |
{rows}

![Loss over steps](loss.png)

Serve it where it is:

    {method.serving(placeholders, "THIS_DIRECTORY")}

or load it in Python:

    {loading}

`training.json` holds every option, loss and version of the run.
"""


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # hotswap itself, run from its sources
            continue
    return found
