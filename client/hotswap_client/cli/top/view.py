"""Figures as tables, with fewer columns where the terminal is narrow."""

from __future__ import annotations

from typing import Final

from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from hotswap_client.cli.top.figures import Figures, Quantiles

_NARROW: Final = 56
_MEDIUM: Final = 72
_WIDE: Final = 104


def view(figures: Figures, width: int, problem: str = "") -> RenderableType:
    """All of it for a terminal of `width` columns; `problem` is why it is not of this moment."""
    parts: list[RenderableType] = [_head(figures), _engine(figures), _methods(figures, width)]
    if figures.adapters:
        parts.append(_adapters(figures, width))
    if problem:
        parts.append(Text(problem, style="bold red"))
    return Group(*parts)


def _head(figures: Figures) -> Text:
    span = f"last {figures.seconds:.0f} s" if figures.seconds else "since the start"
    return Text.assemble(
        ("hotswap ", "bold"), f"{figures.version}  {figures.base} on {figures.device}  ", (span, "dim")
    )


def _engine(figures: Figures) -> Table:
    held = figures.kv_pages_used - figures.kv_pages_prefixes
    rows = {
        "requests": f"{figures.running} running, {figures.waiting} waiting",
        "calls": _codes(figures),
        "tokens": f"{_rate(figures, figures.generated_tokens_per_second)} generated, "
        f"{_rate(figures, figures.prompt_tokens_per_second)} read",
        "steps": ", ".join(f"{phase} {_pair(q)}" for phase, q in figures.steps.items()) or "-",
        "batch": "-"
        if figures.batch_size is None
        else f"{figures.batch_size:.1f} requests, {figures.batch_adapters or 0:.1f} adapters",
        "queue": f"{_pair(figures.queue)}; adapters {_pair(figures.load)}",
        "KV pages": f"{held} + {figures.kv_pages_prefixes} of prefixes, of {figures.kv_pages}"
        + (f" ({held / figures.kv_pages:.0%})" if figures.kv_pages else "")
        + (
            f"; {_rate(figures, figures.preemptions_per_second)} preempted"
            if figures.preemptions_per_second
            else ""
        ),
    }
    table = Table.grid(padding=(0, 1))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in rows.items():
        table.add_row(name, escape(text))
    return table


def _codes(figures: Figures) -> str:
    return ", ".join(f"{_rate(figures, rate)} {code}" for code, rate in figures.codes.items()) or "none"


def _rate(figures: Figures, rate: float) -> str:
    return f"{rate:.1f}/s" if figures.seconds else f"{rate:.0f}"


def _methods(figures: Figures, width: int) -> RenderableType:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    table.add_column("method", no_wrap=True)
    headings = ["path"] if width >= _MEDIUM else []
    headings += ["tokens", "first token", "between"] if width >= _NARROW else ["first token"]
    if width >= _WIDE:
        headings += ["end to end", "requests"]
    headings.append("cost")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "path" else "right", no_wrap=True)
    for row in figures.methods:
        name = row.method if width >= _MEDIUM or row.path != "merged" else f"{row.method}*"
        cells = {
            "path": row.path,
            "tokens": _rate(figures, row.tokens_per_second),
            "first token": _pair(row.first_token),
            "between": _pair(row.inter_token),
            "end to end": _pair(row.end_to_end),
            "requests": _rate(figures, row.requests_per_second),
            "cost": "-" if row.overhead is None else f"{row.overhead:.2f}x",
        }
        table.add_row(name, *(cells[heading] for heading in headings))
    if not figures.methods:
        return Text("no requests yet\n", style="dim")
    return table


def _adapters(figures: Figures, width: int) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    table.add_column("adapters", no_wrap=True)
    headings = ["slots", "device", "host"]
    if width >= _MEDIUM:
        headings += ["underway", "swaps"]
    if width >= _WIDE:
        headings += ["pinned", "loads"]
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in figures.adapters:
        cells = {
            "slots": f"{row.slots_used}/{row.slots}",
            "device": f"{row.on_device}, {_size(row.device_bytes)}",
            "host": f"{row.in_host}, {_size(row.host_bytes)}",
            "underway": str(row.underway),
            "swaps": _rate(figures, row.swaps_per_second),
            "pinned": str(row.pinned),
            "loads": _rate(figures, row.loads_per_second),
        }
        table.add_row(row.method, *(cells[heading] for heading in headings))
    if figures.merged:
        table.caption, table.caption_justify = "an adapter is merged into the base", "left"
    return table


def _pair(quantiles: Quantiles) -> str:
    """The 50th and 95th percentile in one unit."""
    if quantiles.p50 is None or quantiles.p95 is None:
        return "-"
    if quantiles.p95 < 1:
        return f"{quantiles.p50 * 1e3:.0f}/{quantiles.p95 * 1e3:.0f} ms"
    return f"{quantiles.p50:.1f}/{quantiles.p95:.1f} s"


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
