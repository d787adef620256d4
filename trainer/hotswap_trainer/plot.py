"""The loss curve of a run as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hotswap_trainer.loop import Point

_TRAIN, _EVAL, _TEXT, _GRID = "#2f6fde", "#e0662f", "#33383f", "#e6e8eb"


def plot_losses(history: Sequence[Point], path: Path, *, title: str) -> None:
    """Write training (raw and smoothed) and evaluation loss over steps to the PNG file `path`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    train = [point for point in history if point.kind == "train"]
    evaluation = [point for point in history if point.kind == "eval"]
    figure = Figure(figsize=(7.2, 4.2), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps, losses = [point.step for point in train], [point.loss for point in train]
    axes.plot(steps, losses, color=_TRAIN, alpha=0.28, linewidth=1.2)
    axes.plot(steps, _smoothed(losses), color=_TRAIN, linewidth=2, label="training")
    if evaluation:
        axes.plot(
            [point.step for point in evaluation],
            [point.loss for point in evaluation],
            color=_EVAL,
            linewidth=2,
            marker="o",
            markersize=5,
            markeredgecolor="white",
            label="evaluation",
        )
        last = evaluation[-1]
        axes.annotate(
            f"{last.loss:.3f}",
            (last.step, last.loss),
            (0, 9),
            textcoords="offset points",
            color=_EVAL,
            ha="center",
        )
    axes.set_title(title, loc="left", color=_TEXT, fontweight="bold")
    axes.set_xlabel("step", color=_TEXT)
    axes.set_ylabel("loss per token (nats)", color=_TEXT)
    axes.set_ylim(bottom=0)
    axes.margins(x=0.03)
    axes.grid(axis="y", color=_GRID)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_TEXT, length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_GRID)
    axes.legend(frameon=False, labelcolor=_TEXT)
    figure.savefig(path)


def _smoothed(losses: Sequence[float]) -> list[float]:
    """An exponential moving average over a fortieth of the run, so that few points stay as they are."""
    weight = min(0.9, 1 - 1 / max(1.0, len(losses) / 40))
    smoothed = list(losses)
    for i in range(1, len(losses)):
        smoothed[i] = weight * smoothed[i - 1] + (1 - weight) * losses[i]
    return smoothed
