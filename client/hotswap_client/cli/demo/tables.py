"""The demo's tables, and what to type next."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.table import Table
from rich.text import Text

from hotswap_client.cli.demo.asking import Accuracy, Answer
from hotswap_client.cli.demo.tasks import Task
from hotswap_client.cli.demo.view import who


def accuracy_table(rows: Sequence[Accuracy]) -> Table:
    """Right answers of the base and of each adapter."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("adapter", no_wrap=True)
    table.add_column("method")
    table.add_column("what it does")
    table.add_column("before (base)", justify="right")
    table.add_column("after (adapter)", justify="right")
    for row in rows:
        after = _share(row.after, row.num_questions)
        table.add_row(
            row.task.adapter,
            row.task.method,
            row.task.summary,
            _share(row.before, row.num_questions),
            Text(after, style="bold green" if row.learnt else "bold red"),
        )
    return table


def latency_table(together: Sequence[Answer], alone: Sequence[Answer]) -> Table:
    """Times of every request, in milliseconds: the server's for queue and load, ours for the others."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))  # so that 80 columns are enough
    table.add_column("milliseconds", no_wrap=True)
    for heading in ("queue", "load", "first token", "per token", "total", "tok/s"):
        table.add_column(heading, justify="right")
    for title, answers in (("together, in one batch", together), ("alone, one after another", alone)):
        table.add_row(Text(title, style="bold"))
        for answer in answers:
            if answer.result is None:
                continue
            timings, count = answer.result.timings, answer.result.usage.generated_tokens
            seconds = (timings.queue, timings.load, answer.first_token, answer.between_tokens, answer.total)
            rate = count / answer.total
            table.add_row(f"  {who(answer)}", *(f"{1000 * value:.0f}" for value in seconds), f"{rate:.1f}")
        table.add_section()
    return table


def span(answers: Sequence[Answer]) -> float:
    """Seconds from the first request's start to the last one's end."""
    return max(answer.ended for answer in answers) - min(answer.started for answer in answers)


def next_commands(task: Task, base: str, store: Path) -> list[str]:
    """Commands for a shell: serve what was trained, ask it, train something of one's own."""
    where = shlex.quote(str(store))
    model = f"--base {shlex.quote(base)}"
    prompt = task.questions()[-1].prompt
    return [
        f"hotswap serve {model} --store {where}",
        f"hotswap generate --adapter {task.adapter} --temperature 0 {_shell_string(prompt)}",
        f"hotswap train {model} --data {shlex.quote(str(task.train_file))} --name you/{task.name} "
        f"--output {where}",
    ]


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s" if seconds < 10 else f"{rest} s"


def _share(right: int, count: int) -> str:
    return f"{right}/{count}  {right / count:4.0%}"


def _shell_string(text: str) -> str:
    """A word of bash, with line breaks as \\n."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return f"$'{escaped}'"
