"""The report's pictures: quality against what it costs, latency, forgetting and losses."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hotswap_client.cli.compare.labels import place_labels
from hotswap_client.cli.compare.results import Comparison, MethodResult, overhead
from hotswap_client.cli.compare.units import signed_share

_COLOURS = {
    "base": "#6b7280",
    "lora": "#2f6fde",
    "qlora": "#0f9aa8",
    "bottleneck": "#e0662f",
    "prefix": "#8a4fd3",
    "ia3": "#3b9c4f",
    "full": "#c0264f",
}
_TEXT, _GRID, _FRONT = "#33383f", "#e6e8eb", "#b6bcc6"
_LOG_BELOW, _LEAST_LOSS = 0.1, 1e-4
_SIZE = (4.8, 3.5)  # inches: readable on a telephone, where it is scaled least


@dataclass(frozen=True, slots=True)
class Point:
    """A method or a method's path in a plot of quality against a cost."""

    label: str
    method: str
    cost: float
    quality: float


@dataclass(frozen=True, slots=True)
class Picture:
    """A drawing in two formats. `text` says what it shows to those who do not see it."""

    name: str
    title: str
    text: str
    svg: str
    png: bytes


def pictures(comparison: Comparison) -> tuple[Picture, ...]:
    """All pictures, the same for the same numbers."""
    quality = "right answers" if comparison.by_accuracy else "likelihood of a right token"
    latency = latency_points(comparison)
    memory = _points(comparison, lambda result: result.trained.memory / 1e9)
    checkpoints = _points(comparison, lambda result: result.trained.checkpoint_bytes / 1e6)

    def pareto(points: Sequence[Point], xlabel: str, **axis: bool) -> Callable[[Any], None]:
        return lambda axes: _draw_pareto(axes, points, xlabel, quality, **axis)

    return (
        _picture(
            "quality-latency",
            "Quality against latency",
            pareto(latency, "time between tokens over base", shares=True),
            _spoken(latency),
        ),
        _picture(
            "quality-memory",
            "Quality against memory",
            pareto(memory, "peak memory of training, GB"),
            _spoken(memory),
        ),
        _picture(
            "quality-checkpoint",
            "Quality against checkpoint",
            pareto(checkpoints, "size of the checkpoint, MB", logarithmic=True),
            _spoken(checkpoints),
        ),
        _picture(
            "latency",
            "Time between tokens",
            lambda axes: _draw_latency(axes, comparison),
            "Bars of the median and 95th percentile; the table has the numbers.",
        ),
        _picture(
            "forgetting",
            "Change on other text and knowledge",
            lambda axes: _draw_forgetting(axes, comparison),
            "Bars of the changes; the table has the numbers.",
        ),
        _picture(
            "losses",
            "Training loss",
            lambda axes: _draw_losses(axes, comparison),
            "Curves of the loss over steps.",
        ),
    )


def latency_points(comparison: Comparison) -> list[Point]:
    """By the largest share over the base's time between tokens."""
    points = []
    for result in comparison.methods:
        quality = comparison.quality(result.evaluation)
        points.append(Point(result.name, result.name, overhead(result.latency), quality))
        if result.merged is not None:
            points.append(Point(f"{result.name}, merged", result.name, overhead(result.merged), quality))
    return points


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """Those that no other beats in both: cheapest first, each better than the one before it."""
    front: list[Point] = []
    for point in sorted(points, key=lambda point: (point.cost, -point.quality)):
        if not front or point.quality > front[-1].quality:
            front.append(point)
    return front


def _points(comparison: Comparison, cost: Callable[[MethodResult], float]) -> list[Point]:
    return [
        Point(result.name, result.name, cost(result), comparison.quality(result.evaluation))
        for result in comparison.methods
    ]


def _picture(name: str, title: str, draw: Callable[[Any], None], text: str) -> Picture:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Letters as outlines look alike everywhere; the salt makes identifiers the same each time.
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": name, "font.size": 9}):
        figure = Figure(figsize=_SIZE, dpi=160, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        axes.grid(color=_GRID)
        axes.set_axisbelow(True)
        axes.tick_params(colors=_TEXT, length=0)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(_GRID)
        draw(axes)
        svg, png = io.StringIO(), io.BytesIO()
        figure.savefig(svg, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
        figure.savefig(png, format="png", metadata={"Software": None})
    return Picture(name, title, f"{title}. {text}", svg.getvalue(), png.getvalue())


def _spoken(points: Sequence[Point]) -> str:
    return "; ".join(f"{point.label}: {point.quality:.0%} at {point.cost:.2f}" for point in points) + "."


def _draw_pareto(
    axes: Any,
    points: Sequence[Point],
    xlabel: str,
    ylabel: str,
    *,
    shares: bool = False,
    logarithmic: bool = False,
) -> None:
    from matplotlib.patheffects import withStroke
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, PercentFormatter

    front = pareto_front(points)
    axes.step(
        [point.cost for point in front],
        [point.quality for point in front],
        where="post",
        color=_FRONT,
        linestyle="--",
        linewidth=1.3,
        zorder=1,
    )
    for point in points:
        merged = point.label != point.method
        colour = _COLOURS[point.method]
        axes.plot(
            point.cost,
            point.quality,
            marker="o",
            markersize=8,
            color="white" if merged else colour,
            markeredgecolor=colour,
            markeredgewidth=1.6,
        )
    _set_limits(axes, points, logarithmic=logarithmic)
    axes.set_xlabel(xlabel, color=_TEXT)
    axes.set_ylabel(ylabel, color=_TEXT)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0 if axes.get_ylim()[1] > 0.1 else 1))
    if shares:
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        left, right = axes.get_xlim()
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0 if right - left > 0.06 else 1))
    if logarithmic:
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    places = [axes.transData.transform((point.cost, point.quality)) for point in points]
    scale = axes.figure.dpi / 72
    spots = place_labels(
        [(x / scale, y / scale, point.label) for (x, y), point in zip(places, points, strict=True)]
    )
    for point, spot in zip(points, spots, strict=True):
        axes.annotate(
            point.label,
            (point.cost, point.quality),
            (spot.right, spot.up),
            textcoords="offset points",
            ha=spot.align,
            va="center",
            color=_COLOURS[point.method],
            path_effects=[withStroke(linewidth=3, foreground="white")],
        )


def _set_limits(axes: Any, points: Sequence[Point], *, logarithmic: bool) -> None:
    costs = [point.cost for point in points]
    most = max(point.quality for point in points)
    top = 1.0 if most > 0.3 else max(most, 0.01)
    axes.set_ylim(-0.06 * top, 1.08 * top)
    if logarithmic:
        axes.set_xscale("log")
        axes.set_xlim(min(costs) / 2, max(costs) * 2)
        return
    span = max(max(costs) - min(costs), 0.1 * max(costs), 0.02)
    axes.set_xlim(min(costs) - 0.08 * span, max(costs) + 0.08 * span)


def _draw_latency(axes: Any, comparison: Comparison) -> None:
    rows = [("base", "base", comparison.base_latency)]
    for result in comparison.methods:
        rows.append((result.name, result.name, result.latency))
        if result.merged is not None:
            rows.append((f"{result.name}, merged", result.name, result.merged))
    sizes = list(comparison.base_latency)
    height = 0.8 / len(sizes)
    for index, (_, method, latency) in enumerate(rows):
        for place, size in enumerate(sizes):
            times = latency[size].between_tokens
            at = index + (place - (len(sizes) - 1) / 2) * height
            alpha = 0.45 + 0.55 * place / max(1, len(sizes) - 1)
            axes.barh(at, 1000 * times.p50, 0.9 * height, color=_COLOURS[method], alpha=alpha)
            axes.plot([1000 * times.p50, 1000 * times.p95], [at, at], color=_TEXT, linewidth=1, alpha=0.7)
    axes.set_yticks(range(len(rows)), [label for label, _, _ in rows])
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    shades = ", ".join(f"{size} (darker)" if place else str(size) for place, size in enumerate(sizes))
    axes.set_xlabel(f"ms at {shades} requests; lines to the 95th percentile", color=_TEXT)


def _draw_forgetting(axes: Any, comparison: Comparison) -> None:
    names = [result.name for result in comparison.methods]
    changes = [comparison.text_change(result) for result in comparison.methods]
    bars = axes.barh(range(len(names)), changes, 0.6, color=[_COLOURS[name] for name in names])
    known = [
        f"knowledge {signed_share(comparison.knowledge_change(result))}" for result in comparison.methods
    ]
    axes.bar_label(bars, known, padding=4, color=_TEXT, fontsize=8)
    axes.axvline(0, color=_TEXT, linewidth=0.8)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    least, most = min(0.0, *changes), max(0.0, *changes)
    room = 0.45 * max(most - least, 0.05)
    axes.set_xlim(least - (room if least < 0 else 0), most + (room if most > 0 or least == 0 else 0))
    axes.set_xlabel("log-likelihood of other text over base, nats a token", color=_TEXT)


def _draw_losses(axes: Any, comparison: Comparison) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    lowest = 1.0
    for result in comparison.methods:
        steps = [step for step, _ in result.trained.losses]
        losses = [max(loss, _LEAST_LOSS) for _, loss in result.trained.losses]
        axes.plot(steps, losses, color=_COLOURS[result.name], linewidth=1.5, label=result.name)
        lowest = min(lowest, *losses)
    if lowest < _LOG_BELOW:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("step", color=_TEXT)
    axes.set_ylabel("loss, nats a token", color=_TEXT)
    axes.legend(frameon=False, labelcolor=_TEXT, ncols=2, fontsize=8)
