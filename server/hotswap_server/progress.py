"""What a start shows of graphs that are recorded: a bar on a terminal, otherwise lines in the log."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import structlog

from hotswap_server.engine.graphs import Progress

_log = structlog.stdlib.get_logger(__name__)


@contextmanager
def recording_progress() -> Iterator[Progress]:
    """To be told how many of how many graphs there are; the bar is gone at the end of the `with` block."""
    with ExitStack() as shown:
        yield _bar(shown) if sys.stderr.isatty() else _line


def _line(done: int, total: int) -> None:
    _log.info("recording_graphs", done=done, total=total)


def _bar(shown: ExitStack) -> Progress:
    """Shown from the first call on, since most starts record nothing."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("recording graphs"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    bar = Bar(*columns, console=Console(stderr=True), transient=True)
    task = bar.add_task("", total=None)

    def tell(done: int, total: int) -> None:
        if not bar.live.is_started:
            shown.enter_context(bar)
        bar.update(task, completed=done, total=total)

    return tell
