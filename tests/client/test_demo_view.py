"""How the demo's answers and tables look."""

import asyncio
import io

import pytest
from hotswap_client import FinishReason, GenerateResult, ServingPath, Timings, Usage
from hotswap_client.cli.demo import tables, view
from hotswap_client.cli.demo.asking import Accuracy, mixed_batch
from hotswap_client.cli.demo.tasks import TASKS
from rich.console import Console


def result(answer, text):
    adapter = answer.task.adapter if answer.task else None
    return GenerateResult(
        text=text,
        token_ids=(1, 2, 3),
        finish_reason=FinishReason.STOP_TOKEN,
        adapter=adapter,
        version=4 if adapter else None,
        digest=None,
        method="lora" if adapter else "none",
        path=ServingPath.BATCHED if adapter else ServingPath.BASE,
        usage=Usage(prompt_tokens=5, generated_tokens=3),
        timings=Timings(queue=0.001, load=0.25, prefill=0.1, decode=0.2),
    )


def end(answer, text, started=10.0):
    answer.text, answer.result = text, result(answer, text)
    answer.started, answer.arrivals, answer.ended = started, [started + 0.5, started + 0.6], started + 1.5
    return answer


def printed(renderable, width=160):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(renderable)
    return console.export_text()


def test_four_columns_show_growing_answers_beside_one_another():
    answers = mixed_batch(TASKS)
    answers[0].text, answers[0].arrivals = ' {"queue"', [0.1]
    shown = printed(view.side_by_side(answers, 160, 50))
    titles = shown.splitlines()[0]
    for task in TASKS:
        assert f" {task.adapter} " in titles
    assert " base " in titles
    assert '{"queue"▌' in shown
    assert "streaming" in shown
    assert shown.count("waiting") == 3


def test_an_ended_answer_shows_version_path_and_whether_it_is_right():
    answers = mixed_batch(TASKS)
    for answer in answers:
        end(answer, answer.question.answer)
    answers[1].text = "nonsense"
    shown = printed(view.side_by_side(answers, 160, 50))
    for task in TASKS:
        assert f"{task.adapter}@4" in shown
    assert shown.count("path batched · 3 tokens · right") == 2
    assert shown.count("path batched · 3 tokens · wrong") == 1
    assert "path base · 3 tokens ─" in shown
    assert "▌" not in shown


@pytest.mark.parametrize(("width", "height", "rows"), [(160, 50, 1), (80, 24, 2), (40, 24, 4)])
def test_the_grid_fits_the_terminal(width, height, rows):
    shown = printed(view.side_by_side(mixed_batch(TASKS), width, height), width).splitlines()
    assert len(shown) < max(height, 4 * 6 + 1)
    assert all(len(line) <= width for line in shown)
    assert sum(line.startswith("╭") for line in shown) == rows


def test_markup_in_an_answer_is_text():
    answer = end(mixed_batch(TASKS)[0], "[red]x[/] [/]")
    assert "[red]x[/] [/]" in printed(view.side_by_side([answer], 160, 50))
    assert "[red]x[/] [/]" in printed(view.plain(answer))


async def test_without_a_terminal_each_answer_is_printed_as_it_ends():
    answers = mixed_batch(TASKS)

    async def fill():
        for answer in reversed(answers):
            await asyncio.sleep(0.05)
            end(answer, answer.question.answer)

    console = Console(width=80, file=io.StringIO())
    await view.watch(console, answers, fill())
    shown = console.file.getvalue()
    heads = [line for line in shown.splitlines() if " s  " in line]
    shown_names = [line.partition(" s  ")[2].partition(" · ")[0] for line in heads]
    assert shown_names == [view.who(answer) for answer in reversed(answers)]
    assert "        > Arr, this" in shown
    assert "\x1b" not in shown


async def test_a_failure_while_watching_is_raised():
    async def fill():
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        await asyncio.wait_for(view.watch(Console(file=io.StringIO()), mixed_batch(TASKS), fill()), 10)


def test_the_table_of_latencies():
    together = [end(answer, "x") for answer in mixed_batch(TASKS)]
    alone = [end(answer, "x", started=20.0 + index) for index, answer in enumerate(mixed_batch(TASKS))]
    shown = printed(tables.latency_table(together, alone))
    # queue, load, first token, per token, total, tokens/s
    line = next(line.split() for line in shown.splitlines() if TASKS[0].adapter in line)
    assert line == [f"{TASKS[0].adapter}@4", TASKS[0].method, "1", "250", "500", "100", "1500", "2.0"]
    assert shown.count("@4") == 6
    assert "…" not in printed(tables.latency_table(together, alone), width=80)
    assert tables.span(together) == pytest.approx(1.5)
    assert tables.span(alone) == pytest.approx(4.5)


def test_the_table_of_accuracy_and_who_has_learnt():
    rows = [Accuracy(TASKS[0], 24, 2, 21), Accuracy(TASKS[1], 20, 10, 15)]
    assert [row.learnt for row in rows] == [True, False]
    shown = printed(tables.accuracy_table(rows), width=80)
    assert "2/24    8%" in shown
    assert "21/24   88%" in shown


def test_the_next_commands_can_be_pasted(tmp_path):
    import subprocess

    store = tmp_path / "a store"
    serve, generate, train = tables.next_commands(TASKS[1], "smollm2", store)
    echo = "hotswap() { printf '%s\\0' \"$@\"; }; "
    for command in (serve, generate, train):
        output = subprocess.run(["bash", "-c", echo + command], capture_output=True, text=True, check=True)
        words = output.stdout.split("\0")
        if command == generate:
            assert TASKS[1].questions()[-1].prompt in words
        else:
            assert str(store) in words


@pytest.mark.parametrize(("seconds", "text"), [(1.234, "1.2 s"), (59.4, "59 s"), (125, "2 min 5 s")])
def test_durations(seconds, text):
    assert tables.duration(seconds) == text
