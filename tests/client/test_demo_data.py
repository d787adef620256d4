"""The demo's datasets: well-formed, without leaks, made by their script; and what counts as right."""

import json
import re
import runpy
from collections import Counter

import pytest
from hotswap_client.cli.demo.tasks import DATA, MAX_NEW_TOKENS, TASKS, Question

from .conftest import ROOT

BY_NAME = {task.name: task for task in TASKS}


def rows(name, part):
    return [json.loads(line) for line in (DATA / f"{name}.{part}.jsonl").read_text("utf-8").splitlines()]


@pytest.mark.parametrize("name", BY_NAME)
def test_datasets_are_prompts_and_completions_and_large_enough(name):
    train, test = rows(name, "train"), rows(name, "test")
    assert len(train) >= 100
    assert 20 <= len(test) <= 30
    for row in train + test:
        assert set(row) == {"prompt", "completion"}
        assert row["prompt"].endswith(":")
        assert row["completion"].strip()
        assert not row["prompt"].endswith(" ")
    # No list of examples that are the same but for a word.
    assert len({row["completion"] for row in train}) >= 10


@pytest.mark.parametrize("name", BY_NAME)
def test_no_test_question_is_trained_on(name):
    train, test = ({row["prompt"] for row in rows(name, part)} for part in ("train", "test"))
    assert len(train) == len(rows(name, "train"))
    assert len(test) == len(rows(name, "test"))
    assert not train & test


def test_the_test_sets_use_phrases_that_no_training_example_has():
    def sentences(part):
        texts = [row["prompt"].split("\n")[0].partition(": ")[2] for row in rows("tickets", part)]
        return {sentence for text in texts for sentence in re.findall(r"[^.!?]+[.!?]", text + ".")}

    assert not {s.strip(" .") for s in sentences("train")} & {s.strip(" .") for s in sentences("test")}

    def dishes(part):
        return {
            frozenset(line.partition(" x ")[2] for line in row["completion"].split("\n")[1:])
            for row in rows("orders", part)
        }

    assert not dishes("train") & dishes("test")

    def products(part):
        return {re.search(r"this (.*) be", row["completion"])[1] for row in rows("reviews", part)}

    assert not products("train") & products("test")


def test_labels_are_balanced():
    for part in ("train", "test"):
        routes = [json.loads(row["completion"]) for row in rows("tickets", part)]
        for key, num_values in (("queue", 4), ("priority", 3)):
            counts = Counter(route[key] for route in routes)
            assert len(counts) == num_values
            assert max(counts.values()) - min(counts.values()) <= 4


def test_the_script_makes_these_files(monkeypatch, tmp_path):
    script = runpy.run_path(str(ROOT / "examples/data/make_datasets.py"))
    monkeypatch.setitem(script["main"].__globals__, "FOLDER", tmp_path)
    script["main"]()
    made = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert made == {path.name: path.read_bytes() for path in DATA.glob("*.jsonl")}
    assert len(made) == 2 * len(TASKS)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_right_answers_are_right_for_themselves_alone(task):
    questions = task.questions()
    for question in questions:
        assert task.is_right(question, question.answer)
        for wrong in ("", "I cannot say.", question.answer + " And more.", question.answer[:-2]):
            assert not task.is_right(question, wrong)
        # No token is shorter than a character and a half here, so no right answer is cut.
        assert len(question.answer) / 1.5 < 3 * MAX_NEW_TOKENS
    others = [question.answer for question in questions[1:] if question.answer != questions[0].answer]
    assert not any(task.is_right(questions[0], answer) for answer in others)


@pytest.mark.parametrize(
    ("name", "answer", "right", "wrong"),
    [
        (
            "tickets",
            ' {"queue": "billing", "priority": "low"}',
            ['{"priority":"low","queue":"billing"}', '\n{"queue": "billing",\n"priority": "low"}\n'],
            ['{"queue": "billing"}', '{"queue": "billing", "priority": "high"}', "billing, low", "{}"],
        ),
        (
            "orders",
            "\n2 x bagel\n1 x apple pie",
            ["1 x apple pie\n2 x bagel", " 2 x  bagel \n1 x apple pie\n"],
            ["2 x bagel", "2 x bagel\n2 x apple pie", "2 x bagel\n1 x apple pie\n1 x bagel", "2 bagels"],
        ),
        (
            "reviews",
            " Arr, this kettle be treasure!",
            ["arr, this kettle be treasure!", "Arr,  this kettle\nbe treasure!"],
            ["Arr, this kettle be driftwood!", "Arr, this tent be treasure!", "Treasure!"],
        ),
    ],
)
def test_what_counts_as_right(name, answer, right, wrong):
    question = Question("", answer)
    assert all(BY_NAME[name].is_right(question, text) for text in right)
    assert not any(BY_NAME[name].is_right(question, text) for text in wrong)


def test_every_training_setting_is_an_option_of_the_trainer():
    from hotswap_trainer.config import configure

    for task in TASKS:
        flags = {key: str(value) for key, value in task.training.items()}
        run = configure({**flags, "data": str(task.train_file), "name": task.adapter, "output": "store"})
        used = {**vars_of(run.options), **vars_of(run.method_options)}
        assert {key: used[key] for key in task.training} == task.training


def vars_of(options):
    return {name: getattr(options, name) for name in options.__slots__}
