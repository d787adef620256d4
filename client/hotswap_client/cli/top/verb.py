"""The `top` verb."""

from __future__ import annotations

import dataclasses
import json
import time
from collections import deque
from typing import Annotated, Final

import typer

from hotswap_client.cli.top.figures import Figures, figures
from hotswap_client.cli.top.scrape import Scrape, ScrapeError, endpoint, scrape

_CONNECTION_ERROR: Final = 1


def top(
    url: Annotated[
        str, typer.Option("--url", help="The server's metrics: HOST:PORT or a URL.")
    ] = "http://127.0.0.1:9400/metrics",
    interval: Annotated[float, typer.Option(min=0.1, max=3600, help="Seconds between two looks.")] = 2.0,
    window: Annotated[
        float, typer.Option(min=0, max=3600, help="Seconds that rates and latencies are of.")
    ] = 10.0,
    once: Annotated[
        bool, typer.Option("--once", help="Look once: figures since the server's start.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, an object for every look.")] = False,
) -> None:
    """Watch a server: latency by method, batching, adapters, queue."""
    try:
        address = endpoint(url)
        first = scrape(address)
        if as_json:
            _print_json(address, first, interval, window, once=once)
        elif once:
            from rich.console import Console

            from hotswap_client.cli.top.view import view

            console = Console()
            console.print(view(figures(None, first), console.width))
        else:
            _watch(address, first, interval, window)
    except ScrapeError as error:
        typer.echo(f"hotswap top: {error}", err=True)
        raise typer.Exit(_CONNECTION_ERROR) from None
    except KeyboardInterrupt:
        pass  # the way to leave it


class _Window:
    """The last scrapes, to compare the newest with."""

    def __init__(self, first: Scrape, seconds: float) -> None:
        self._scrapes = deque([first])
        self._seconds = seconds

    def add(self, now: Scrape) -> Figures:
        while len(self._scrapes) > 1 and now.at - self._scrapes[1].at >= self._seconds:
            self._scrapes.popleft()
        before = self._scrapes[0]
        self._scrapes.append(now)
        return figures(before, now)


def _print_json(address: str, first: Scrape, interval: float, window: float, *, once: bool) -> None:
    seen = _Window(first, window)
    shown = figures(None, first)
    while True:
        typer.echo(json.dumps(dataclasses.asdict(shown), ensure_ascii=False))
        if once:
            return
        time.sleep(interval)
        shown = seen.add(scrape(address))


def _watch(address: str, first: Scrape, interval: float, window: float) -> None:
    """A server that does not answer is shown as it was, and asked again."""
    from rich.console import Console
    from rich.live import Live

    from hotswap_client.cli.top.view import view

    console = Console()
    seen = _Window(first, window)
    shown = figures(None, first)
    with Live(
        view(shown, console.width), console=console, screen=console.is_terminal, auto_refresh=False
    ) as live:
        while True:
            time.sleep(interval)
            problem = ""
            try:
                shown = seen.add(scrape(address))
            except ScrapeError as error:
                problem = str(error)
            live.update(view(shown, console.width, problem), refresh=True)
