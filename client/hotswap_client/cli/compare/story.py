"""What a comparison does, in order: train, serve, ask, take times, and write the report."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from hotswap_client.cli.compare import markdown, plots, tables, training, units
from hotswap_client.cli.compare.facts import facts
from hotswap_client.cli.compare.html import page
from hotswap_client.cli.compare.measuring import Measurements, Servers, measure, saved
from hotswap_client.cli.compare.options import CompareError, CompareOptions
from hotswap_client.cli.compare.questions import Material, prepare
from hotswap_client.cli.compare.recommend import Recommendation, recommend
from hotswap_client.cli.compare.results import Comparison, MethodResult, as_json
from hotswap_client.cli.compare.state import State
from hotswap_client.cli.compare.training import Base, Trained
from hotswap_client.cli.demo import processes

_LEFT_OUT = ("tokens/s", "trainable", "of all", "knowledge")
REPORTS = ("report.html", "report.md", "report.json")


def default_store() -> Path:
    """A directory in the user's cache, so that what is trained is there for the next comparison."""
    import platformdirs

    return Path(os.environ.get("HOTSWAP_CACHE_DIR") or platformdirs.user_cache_dir("hotswap")) / "compare"


def tell(console: Console, options: CompareOptions) -> Comparison:
    """Make the whole comparison.

    Raises:
        CompareError: bad data or options, no such base, a failed training, no space for the report.
        DemoError: a server did not start.
        HotswapError: a server refused a call.
    """
    started = time.monotonic()
    if missing := processes.missing_packages():
        raise CompareError(
            f"`hotswap compare` trains and serves, and lacks {', '.join(missing)}: pip install 'hotswap[all]'"
        )
    try:
        material = prepare(options, options.store / ".data")
        options.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CompareError(
            f"--output and --store: {error.filename} cannot be written: {error.strerror}"
        ) from None
    base = training.open_base(options.base)
    _heading(console, f"Train {', '.join(options.methods)} on {material.title}")
    trained = [_train(console, options, method, material, base) for method in options.methods]

    _heading(console, "Serve them, ask them, and take times")
    found = _measure(console, options, material, base, trained)
    comparison = _assemble(options, material, base, trained, found)
    recommendation = recommend(comparison, options.limits)
    write(options.output, comparison, recommendation)

    _heading(console, "Result")
    console.print(_rich_table(tables.overview(comparison)))
    chosen = recommendation.method or "none of them"
    console.print(f"[bold]Recommended: {escape(chosen)}[/]. {escape(' '.join(recommendation.reasons))}")
    for method, reason in recommendation.excluded.items():
        console.print(f"  {method} {escape(reason)}.")
    console.print(
        f"\nDone in {units.duration(time.monotonic() - started)}: "
        f"{escape(str(options.output / REPORTS[0]))}, and {' and '.join(REPORTS[1:])} beside it.",
        soft_wrap=True,
    )
    return comparison


def write(folder: Path, comparison: Comparison, recommendation: Recommendation) -> None:
    """Write the three reports and the Markdown's pictures.

    Raises:
        CompareError: the folder cannot be written.
    """
    pictures = plots.pictures(comparison)
    content = as_json(comparison, recommendation.as_json())
    html, md, plain = REPORTS
    try:
        for picture in pictures:
            (folder / f"{picture.name}.png").write_bytes(picture.png)
        (folder / html).write_text(page(comparison, recommendation, pictures), "utf-8")
        (folder / md).write_text(markdown.markdown(comparison, recommendation, pictures), "utf-8")
        (folder / plain).write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", "utf-8")
    except OSError as error:
        raise CompareError(f"--output: {error.filename} cannot be written: {error.strerror}") from None


def _train(console: Console, options: CompareOptions, method: str, material: Material, base: Base) -> Trained:
    adapter = training.adapter_name(options, method, material, base)
    settings = options.training(method)
    found = None if options.fresh else training.find(method, adapter, options.store, settings)
    if found is not None:
        console.print(f"[bold]{method}[/]: {found.adapter}@{found.version} is trained already.")
        return found
    console.print(f"[bold]{method}[/]: {material.num_train} examples.")
    console.file.flush()  # before what the trainer prints
    trained = training.train(options, method, adapter, material)
    first, last = trained.losses[0][1], trained.losses[-1][1]
    console.print(
        f"  {trained.steps} steps in {units.duration(trained.seconds)}, loss {first:.3f} to {last:.3f}, "
        f"peak memory {units.bytes_of(trained.memory)}."
    )
    return trained


def _measure(
    console: Console,
    options: CompareOptions,
    material: Material,
    base: Base,
    trained: Sequence[Trained],
) -> Measurements:
    state = State(options.output, forget=options.fresh or options.remeasure)
    done = saved(state, options, base.digest, material.test_digest, trained)
    if (found := done.whole(options.measuring)) is not None:
        console.print("All is measured already (--remeasure does it again).")
        return found
    with ExitStack() as running:
        flags = ("--quantize", options.quantize) if options.quantize else ()
        began = time.monotonic()
        shared = running.enter_context(processes.server(options.base, options.store, *flags))
        own = {
            entry.method: running.enter_context(processes.server(str(entry.path), options.store, *flags))
            for entry in trained
            if entry.method == "full"
        }
        ready = units.duration(time.monotonic() - began)
        console.print(f"hotswap serve is ready after {ready}{', with full in a second one' if own else ''}.")
        return asyncio.run(measure(console, Servers(shared, own), options, material.questions, trained, done))


def _assemble(
    options: CompareOptions,
    material: Material,
    base: Base,
    trained: Sequence[Trained],
    found: Measurements,
) -> Comparison:
    results = tuple(
        MethodResult(
            entry, found.evaluations[entry.method], found.latency(entry.method), found.merged(entry.method)
        )
        for entry in trained
    )
    return Comparison(
        base=found.evaluations["base"],
        base_latency=found.latency("base"),
        base_bytes=base.weight_bytes,
        methods=results,
        question=material.questions[0].shown(),
        answer=material.questions[0].answer,
        facts=facts(options, material, base, trained),
    )


def _rich_table(table: tables.Table) -> object:
    from rich import box
    from rich.table import Table

    # What fits a terminal of 80 columns; the reports have it all.
    kept = [index for index, heading in enumerate(table.headings) if heading not in _LEFT_OUT]
    shown = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for index in kept:
        shown.add_column(table.headings[index], justify="right" if index else "left", no_wrap=index == 0)
    for row in table.rows:
        shown.add_row(*(row[index] for index in kept))
    return shown


def _heading(console: Console, text: str) -> None:
    console.print()
    console.rule(f"[bold]{escape(text)}", align="left", style="dim")
