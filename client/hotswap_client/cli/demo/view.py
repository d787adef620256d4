"""Four answers side by side in a terminal, as they grow; elsewhere a block for each as it ends."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.style import Style
from rich.table import Table
from rich.text import Text

from hotswap_client.cli.demo.asking import Answer

_COLOURS = ("cyan", "yellow", "magenta", "green")
_BASE_COLOUR = "white"
_FRAMES_PER_SECOND = 20
_MIN_COLUMN = 34
_MAX_LINES = 14
"""Of a panel, its frame included."""

_POLL_S = 0.02


async def watch(console: Console, answers: Sequence[Answer], filling: Awaitable[None]) -> None:
    """Show the answers while `filling` fills them."""
    if console.is_terminal:
        with Live(
            get_renderable=lambda: side_by_side(answers, console.width, console.height),
            console=console,
            refresh_per_second=_FRAMES_PER_SECOND,
        ):
            await filling
        return
    task, shown = asyncio.ensure_future(filling), set[int]()
    try:
        while len(shown) < len(answers):
            if task.done():
                await task
            for index, answer in enumerate(answers):
                if answer.result is not None and index not in shown:
                    shown.add(index)
                    console.print(plain(answer), soft_wrap=True)
            await asyncio.sleep(_POLL_S)
    finally:
        task.cancel()


def side_by_side(answers: Sequence[Answer], width: int, height: int) -> Table:
    """A grid of panels: as many columns as the width carries, of 4, 2 and 1."""
    columns = next((count for count in (4, 2) if width // count >= _MIN_COLUMN), 1)
    lines = min(_MAX_LINES, max(6, (height - 1) * columns // len(answers)))
    grid = Table.grid(expand=True)
    for _ in range(columns):
        grid.add_column(ratio=1)
    panels = [_panel(answer, index, lines) for index, answer in enumerate(answers)]
    for start in range(0, len(panels), columns):
        grid.add_row(*panels[start : start + columns])
    return grid


def plain(answer: Answer) -> Text:
    """An ended answer as lines of text: who answered, what was asked, what came."""
    head = f"{answer.ended - answer.started:6.2f} s  {who(answer)} · {_status(answer)}"
    lines = [head, *(f"          {line}" for line in answer.question.prompt.splitlines())]
    return Text("\n".join([*lines, *(f"        > {line}" for line in answer.text.strip().splitlines())]))


def who(answer: Answer) -> str:
    """`tenant/name@version method`, with the version once it is known; `base` for the base."""
    if answer.task is None:
        return "base"
    version = answer.result.version if answer.result else None
    name = answer.task.adapter if version is None else f"{answer.task.adapter}@{version}"
    return f"{name} {answer.task.method}"


def colour(answer: Answer, index: int) -> str:
    return _BASE_COLOUR if answer.task is None else _COLOURS[index % len(_COLOURS)]


def _panel(answer: Answer, index: int, lines: int) -> Panel:
    style = colour(answer, index)
    body = Group(
        Text(answer.question.prompt, style="dim"),
        Text(),
        # A cursor while tokens come; the answer's own first line break would only leave a gap.
        Text(answer.text.lstrip() + ("" if answer.result else "▌"), style=Style.parse("bold")),
    )
    return Panel(
        body,
        title=f"[bold {style}]{who(answer)}[/]",
        subtitle=_status(answer),
        border_style=style,
        box=box.ROUNDED,
        height=lines,
        padding=(0, 1),
    )


def _status(answer: Answer) -> str:
    if answer.result is None:
        return "streaming" if answer.arrivals else "waiting"
    parts = [f"path {answer.result.path}", f"{answer.result.usage.generated_tokens} tokens"]
    if answer.is_right is not None:
        parts.append("right" if answer.is_right else "wrong")
    return " · ".join(parts)
