"""A comparison's options and data: what is read, how it is split, and what is refused."""

import json

import pytest
from hotswap_client.cli.compare import general, questions
from hotswap_client.cli.compare.latency import (
    Burst,
    Overhead,
    Percentiles,
    round_as_json,
    round_of_json,
    summarise,
)
from hotswap_client.cli.compare.options import (
    PRESETS,
    Budget,
    CompareError,
    CompareOptions,
    Measuring,
    method_settings,
    parse_bytes,
    parse_share,
)
from hotswap_client.cli.compare.questions import Question, is_right, prepare
from hotswap_client.cli.compare.state import State, key_of
from hotswap_client.cli.compare.training import Base, adapter_name, find


def options(**fields):
    return CompareOptions(settings=method_settings("lora,full", ()), **fields)


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows(count):
    return [{"prompt": f"q{index}:", "completion": f" a{index}"} for index in range(count)]


def test_sizes_and_shares():
    assert [parse_bytes("--memory", text) for text in ("4096", "50MB", "1.5 GiB", "24g", None)] == [
        4096,
        50_000_000,
        1_610_612_736,
        24_000_000_000,
        None,
    ]
    assert [parse_share("--x", text) for text in ("10%", "0.1", "0", "150%", None)] == [
        0.1,
        0.1,
        0,
        1.5,
        None,
    ]


@pytest.mark.parametrize("text", ["", "much", "-5MB", "0", "5XB", "1iB"])
def test_sizes_that_are_none(text):
    with pytest.raises(CompareError, match=r"^--memory: must be a size"):
        parse_bytes("--memory", text)


@pytest.mark.parametrize(
    ("text", "said"), [("ten", "must be a share"), ("10", "write 10%"), ("-1%", "must be")]
)
def test_shares_that_are_none(text, said):
    with pytest.raises(CompareError, match=rf"^--max-latency-overhead: .*{said}"):
        parse_share("--max-latency-overhead", text)


def test_settings_begin_with_presets():
    found = method_settings("prefix, lora", ["lora.rank=4", "lora.target-modules=q_proj,v_proj"])
    assert list(found) == ["prefix", "lora"]
    assert found["prefix"] == PRESETS["prefix"]
    assert found["lora"] == {"learning_rate": "1e-3", "rank": "4", "target_modules": "q_proj,v_proj"}


@pytest.mark.parametrize(
    ("methods", "changes", "said"),
    [
        ("", [], "--methods: name at least one"),
        ("lroa", [], "did you mean lora"),
        ("lora,lora", [], "twice"),
        ("lora", ["rank=4"], "--set: must be METHOD.OPTION=VALUE"),
        ("lora", ["prefix.num_virtual_tokens=4"], "of no compared method"),
        ("lora", ["lora.epochs=4"], "like with like; use --epochs"),
    ],
)
def test_settings_that_are_refused(methods, changes, said):
    with pytest.raises(CompareError, match=said):
        method_settings(methods, changes)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Budget(epochs=0), "--epochs"),
        (lambda: Budget(max_steps=0), "--max-steps"),
        (lambda: Budget(batch_size=0), "--batch-size"),
        (lambda: Measuring(rounds=0), "--rounds"),
        (lambda: options(test_fraction=1.0), "--test-fraction"),
        (lambda: options(seed=-1), "--seed"),
        (lambda: options(quantize="nf5"), "--quantize"),
    ],
)
def test_options_out_of_range_name_their_flag(make, said):
    with pytest.raises(CompareError, match=rf"^{said}: must be"):
        make()


def test_the_shipped_tasks_take_turns(tmp_path):
    found = prepare(options(), tmp_path)
    prompts = [json.loads(line)["prompt"] for line in found.train_file.read_text().splitlines()]
    assert len(prompts) == found.num_train == 360
    starts = [prompt.partition(":")[0] for prompt in prompts[:6]]
    assert starts == ["Ticket", "Order", "Review"] * 2
    asked = {question.prompt for question in found.questions}
    assert len(asked) == 72
    assert not asked & set(prompts)
    assert prepare(options(data="orders"), tmp_path).num_train == 120
    few = prepare(options(measuring=Measuring(max_questions=5)), tmp_path)
    assert few.questions == found.questions[:5]
    assert few.train_digest == found.train_digest


def test_a_part_of_own_data_is_held_out_as_the_seed_says(tmp_path):
    path = write(tmp_path / "own.jsonl", *rows(20))
    first, again = (prepare(options(data=str(path)), tmp_path) for _ in range(2))
    assert first == again
    assert (first.num_train, len(first.questions)) == (16, 4)
    trained = {json.loads(line)["prompt"] for line in first.train_file.read_text().splitlines()}
    assert not trained & {question.prompt for question in first.questions}
    other = prepare(options(data=str(path), seed=1), tmp_path)
    assert other.train_digest != first.train_digest
    test = write(tmp_path / "test.jsonl", {"prompt": "new", "completion": "answer"})
    given = prepare(options(data=str(path), test_data=test), tmp_path)
    assert (given.num_train, given.questions) == (20, (Question("new", "answer"),))


def test_conversations_are_questions_too(tmp_path):
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
    path = write(
        tmp_path / "chat.jsonl", {"messages": turns}, {"prompt": turns[:1], "completion": turns[1:]}, *rows(1)
    )
    found = prepare(options(data=str(path), test_data=path), tmp_path)
    assert found.questions[0] == found.questions[1]
    assert found.questions[0].asked() == {"messages": turns[:1]}
    assert found.questions[0].as_context() == {"context_messages": turns[:1]}
    assert found.questions[0].shown() == "user: hello"
    assert found.questions[2].asked() == {"prompt": "q0:"}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "has no examples"),
        ("\n\n", "has no examples"),
        ("no json\n" * 2, r"own.jsonl:1 is not a line of JSON"),
        ('{"text": "x"}\n' * 2, r"own.jsonl:1 has no question with an answer"),
        ('{"prompt": "x", "completion": " "}\n' * 2, "no question with an answer"),
        (
            '{"messages": [{"role": "user"}, {"role": "assistant", "content": "x"}]}\n' * 2,
            "role and a content",
        ),
        ('{"prompt": "x", "completion": "y"}\n', "one example"),
        ("[1]\n" * 2, "no question"),
    ],
)
def test_data_that_is_refused(tmp_path, content, said):
    path = tmp_path / "own.jsonl"
    path.write_text(content)
    with pytest.raises(CompareError, match=rf"^--data: .*{said}"):
        prepare(options(data=str(path)), tmp_path)


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(CompareError, match=r"demo, tickets, orders, reviews, or a file; .*No such file"):
        prepare(options(data="nothing.jsonl"), tmp_path)
    with pytest.raises(CompareError, match=r"^--test-data: the shipped data has its own"):
        prepare(options(test_data=tmp_path / "x"), tmp_path)


@pytest.mark.parametrize(
    ("answer", "text", "right"),
    [
        (' {"a": 1, "b": 2}', '{"b":2,"a":1}', True),
        (' {"a": 1}', '{"a": 2}', False),
        ("\n2 x tea\n1 x bun", "2 x  Tea\n1 x bun ", True),
        ("12", "12.0", False),
        ("yes", "yes and no", False),
    ],
)
def test_right_answers(answer, text, right):
    assert is_right(Question("q", answer), text) is right


def test_the_shipped_general_knowledge_is_sound():
    items = general.knowledge()
    assert len(items) == 60 == len({item.question for item in items})
    for item in items:
        assert len(set(item.choices)) == 4
        assert item.question.endswith("?")
    assert general.knowledge(3) == items[::3]
    assert 2000 < sum(map(len, general.paragraphs())) < 4000
    trained = "".join(path.read_text() for path in questions.DATA.glob("*.jsonl"))
    assert not any(item.question in trained for item in items)


def test_an_adapter_is_named_by_all_that_decides_it(tmp_path):
    path = write(tmp_path / "own.jsonl", *rows(20))
    base = Base("smollm2", tmp_path, "ab" * 32, 10)
    plain = options(data=str(path))
    name = adapter_name(plain, "lora", prepare(plain, tmp_path), base)
    assert name.startswith("compare/lora-")
    assert name == adapter_name(plain, "lora", prepare(plain, tmp_path), base)
    changed = [
        (options(data=str(path), seed=1), base),
        (options(data=str(path), budget=Budget(epochs=3)), base),
        (options(data=str(path), test_fraction=0.5), base),
        (CompareOptions(data=str(path), settings=method_settings("lora", ["lora.rank=8"])), base),
        (plain, Base("smollm2", tmp_path, "cd" * 32, 10)),
    ]
    names = {adapter_name(other, "lora", prepare(other, tmp_path), its) for other, its in changed}
    assert len(names | {name}) == len(changed) + 1
    elsewhere = options(data=str(path), output=tmp_path / "x", measuring=Measuring(rounds=9))
    assert adapter_name(elsewhere, "lora", prepare(elsewhere, tmp_path), base) == name


def test_what_is_no_report_of_the_trainer_is_not_taken_for_trained(tmp_path):
    assert find("lora", "compare/lora-1", tmp_path, {}) is None
    folder = tmp_path / "compare" / "lora-1" / "1"
    folder.mkdir(parents=True)
    assert find("lora", "compare/lora-1", tmp_path, {}) is None
    (folder / "training.json").write_text("{}")
    assert find("lora", "compare/lora-1", tmp_path, {}) is None


def test_state_lasts_and_forgets_on_demand(tmp_path):
    key = key_of({"b": 1, "a": [2]})
    assert key == key_of({"a": [2], "b": 1}) != key_of({"a": [2], "b": 2})
    State(tmp_path).put(key, {"x": 1})
    assert State(tmp_path).get(key) == {"x": 1}
    assert State(tmp_path, forget=True).get(key) is None
    (tmp_path / "measurements.json").write_text('{"half')
    assert State(tmp_path).get(key) is None


def burst(first, gap, count=8):
    return Burst((first,) * count, (gap,) * 31 * count, 32 * count, round(first + 31 * gap, 5), "batched")


def test_overheads_are_ratios_within_rounds():
    # The second round runs at half the speed of the first: the overhead is the same.
    rounds = [
        {
            "base": {8: [burst(0.1 * slow, 0.010 * slow), burst(0.1 * slow, 0.012 * slow)]},
            "lora": {8: [burst(0.2 * slow, 0.0121 * slow)]},
        }
        for slow in (1.0, 2.0)
    ]
    found = summarise(rounds, "lora", 8)
    assert found.between_tokens_overhead == Overhead(*(pytest.approx(0.1),) * 3)
    assert found.first_token_overhead.median == pytest.approx(1.0)
    assert found.between_tokens.p50 == pytest.approx(0.01815)
    assert summarise(rounds, "base", 8).between_tokens_overhead.median == pytest.approx(0.0)
    assert [round_of_json(json.loads(json.dumps(round_as_json(entry)))) for entry in rounds] == rounds


def test_percentiles_and_quartiles():
    values = [float(value) for value in range(1, 101)]
    assert Percentiles.of(values) == Percentiles(50.5, 96.0)
    assert Percentiles.of([3.0]) == Percentiles(3.0, 3.0)
    assert Overhead.of([1.5, 1.0, 1.25, 1.1, 2.0]) == Overhead(0.25, pytest.approx(0.1), 0.5)
