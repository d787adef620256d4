"""What the demo does, in order: train, serve, measure, stream, and say what to try next."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from hotswap_client import AsyncClient, HotswapError
from hotswap_client.cli.demo import asking, processes, tables
from hotswap_client.cli.demo.asking import Accuracy
from hotswap_client.cli.demo.processes import DemoError
from hotswap_client.cli.demo.tasks import TASKS, Task
from hotswap_client.cli.demo.view import watch


def default_store() -> Path:
    """A directory in the user's cache, so that a second demo need not train again."""
    import platformdirs

    return Path(os.environ.get("HOTSWAP_CACHE_DIR") or platformdirs.user_cache_dir("hotswap")) / "demo"


def tell(console: Console, base: str, store: Path, *, fresh: bool) -> None:
    """Run the whole demo.

    Raises:
        DemoError: a package is missing, a process failed, or an adapter did not learn its task.
    """
    started = time.monotonic()
    if missing := processes.missing_packages():
        raise DemoError(
            f"`hotswap demo` trains and serves, and lacks {', '.join(missing)}: pip install 'hotswap[all]'"
        )
    console.print(
        f"[bold]hotswap demo[/]: three tenants share one base model, {escape(base)}; each has an adapter, of "
        "a method of its own.\n"
        "First the adapters are trained: minutes, once. Then one server answers for all.\n"
        f"The adapters' store is {escape(str(store))}.",
        soft_wrap=True,
    )
    _train(console, base, store, fresh)

    _heading(console, "2", "Serve them, and count right answers before and after")
    loading = time.monotonic()
    with processes.server(base, store) as target:
        console.print(f"hotswap serve is ready after {_since(loading)}, on {target}.")
        accuracies = asyncio.run(_ask(console, target))
    console.print(
        f"\nDone in {_since(started)}; the server has stopped. Go on with these, from two terminals:\n"
    )
    for command in tables.next_commands(TASKS[0], base, store):
        console.print(f"  [green]{escape(command)}[/]", soft_wrap=True)
    if weak := [accuracy.task.adapter for accuracy in accuracies if not accuracy.learnt]:
        raise DemoError(
            f"{' and '.join(weak)} did not learn: right answers must rise by {asking.LEARNT_MARGIN:.0%} of "
            "the questions; try --fresh, and please report it"
        )


def _train(console: Console, base: str, store: Path, fresh: bool) -> None:
    _heading(console, "1", "Train three adapters: a LoRA, a bottleneck adapter and a prefix")
    for task in TASKS:
        found = None if fresh else processes.find_trained(task, base, store)
        console.print(f"[bold]{task.adapter}[/] {task.summary}: ", end="")
        if found is not None:
            console.print(f"version {found.version} is there.")
            continue
        console.print(f"{task.method}, {len(task.train_file.read_bytes().splitlines())} examples.")
        console.file.flush()  # before what the trainer prints
        began = time.monotonic()
        made = processes.train(task, base, store)
        losses = f"loss {made.first_loss:.3f} → {made.last_loss:.3f}"
        console.print(f"  version {made.version}, {losses}, in {_since(began)}.")


async def _ask(console: Console, target: str) -> list[Accuracy]:
    try:
        async with AsyncClient(target) as client:
            accuracies = await _measure(console, client, TASKS)
            _heading(console, "3", "Stream four answers from one batch")
            for task in TASKS:  # so that the batch shows what loading costs
                await client.adapters.unload(task.adapter)
            together, alone = asking.mixed_batch(TASKS), asking.mixed_batch(TASKS)
            console.print("No adapter is loaded now: their requests wait for that, the base's does not.\n")
            await watch(console, together, asking.stream_together(client, together))
            await asking.stream_alone(client, alone)
    except HotswapError as error:
        raise DemoError(f"the server answered {error.code.name}: {' '.join(str(error).split())}") from error
    console.print(tables.latency_table(together, alone))
    console.print(
        f"All four took {tables.span(together):.2f} s in one batch, {tables.span(alone):.2f} s one by one."
    )
    return accuracies


async def _measure(console: Console, client: AsyncClient, tasks: Sequence[Task]) -> list[Accuracy]:
    num_requests = 2 * sum(len(task.questions()) for task in tasks)
    began = time.monotonic()
    columns = (TextColumn("asking"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("asking", total=num_requests)
        accuracies = await asking.measure_accuracy(client, tasks, lambda: progress.advance(bar))
    console.print(
        f"{num_requests} requests at once, for three adapters and the base, took {_since(began)}.\n"
        "No adapter saw these questions in training. Right answers to the same prompts:"
    )
    console.print(tables.accuracy_table(accuracies))
    return accuracies


def _heading(console: Console, number: str, text: str) -> None:
    console.print()
    console.rule(f"[bold]{number}. {text}", align="left", style="dim")


def _since(began: float) -> str:
    return tables.duration(time.monotonic() - began)
