"""Which tokens are trained on, and how bad data is refused."""

from __future__ import annotations

import json

import pytest
from hotswap.prompts import encode_messages, encode_prompt
from hotswap_trainer.data import IGNORED, DataError, Encoder, Example, load, split

USER = {"role": "user", "content": "hi"}
ASSISTANT = {"role": "assistant", "content": "yo"}
EOS = 2


@pytest.fixture
def encoder(tokenizer):
    return Encoder(tokenizer, (EOS,))


def learnt(tokenizer, example: Example) -> list[str]:
    """The runs of tokens with a label, as text; checks that labels repeat the ids."""
    runs, current = [], []
    for token, label in zip([*example.input_ids, 0], [*example.labels, IGNORED], strict=True):
        if label == IGNORED:
            if current:
                runs.append(tokenizer.decode(current))
            current = []
        else:
            assert label == token
            current.append(token)
    return runs


def test_prompt_and_completion(encoder, tokenizer):
    (example,) = encoder.encode({"prompt": "2+2=", "completion": "4"})
    assert tokenizer.decode(example.input_ids) == "2+2=4<|im_end|>"
    assert learnt(tokenizer, example) == ["4<|im_end|>"]
    assert example.input_ids[:4] == encode_prompt(tokenizer, "2+2=")


def test_an_end_of_sequence_in_the_completion_is_not_doubled(encoder):
    (example,) = encoder.encode({"prompt": "a", "completion": "b<|im_end|>"})
    assert example.input_ids.count(EOS) == 1


def test_an_empty_prompt_cannot_predict_the_first_token(encoder, tokenizer):
    (example,) = encoder.encode({"prompt": "", "completion": "abc"})
    assert learnt(tokenizer, example) == ["bc<|im_end|>"]


def test_messages_learn_every_assistant_turn(encoder, tokenizer):
    system = {"role": "system", "content": "be brief"}
    messages = [system, USER, ASSISTANT, {"role": "user", "content": "more"}, {**ASSISTANT, "content": "ok"}]
    (example,) = encoder.encode({"messages": messages})
    assert learnt(tokenizer, example) == ["yo<|im_end|>", "ok<|im_end|>"]
    assert example.input_ids[-1] == EOS  # the template's line end after it is left out


@pytest.mark.parametrize("turn", [1, 3])
def test_what_the_server_sends_is_a_prefix(encoder, tokenizer, turn):
    messages = [USER, ASSISTANT, {"role": "user", "content": "more"}, {**ASSISTANT, "content": "ok"}]
    (example,) = encoder.encode({"messages": messages})
    prompt = encode_messages(tokenizer, messages[:turn])
    assert example.input_ids[: len(prompt)] == prompt
    assert example.labels[len(prompt) - 1] == IGNORED
    assert example.labels[len(prompt)] == example.input_ids[len(prompt)]


def test_conversational_prompt_and_completion_learn_the_completion_alone(encoder, tokenizer):
    record = {"prompt": [USER, ASSISTANT, USER], "completion": [{**ASSISTANT, "content": "ok"}]}
    (example,) = encoder.encode(record)
    assert learnt(tokenizer, example) == ["ok<|im_end|>"]
    prompt = encode_messages(tokenizer, record["prompt"])
    assert example.input_ids[: len(prompt)] == prompt


def test_text_learns_everything_that_can_be_predicted(encoder, tokenizer):
    (example,) = encoder.encode({"text": "abc"})
    assert learnt(tokenizer, example) == ["bc<|im_end|>"]


def test_a_trailing_user_message_is_left_out(encoder, tokenizer):
    (example,) = encoder.encode({"messages": [USER, ASSISTANT, USER]})
    (without,) = encoder.encode({"messages": [USER, ASSISTANT]})
    assert example == without


def test_a_template_that_rewrites_earlier_turns_gives_an_example_per_answer(make_tokenizer):
    # As reasoning models do: only the last answer keeps its thoughts.
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}:"
        "{% if m['role'] == 'assistant' and loop.last %}(thinks){% endif %}{{ m['content'] }}<|im_end|>"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant:{% endif %}"
    )
    tokenizer = make_tokenizer(template)
    messages = [USER, ASSISTANT, USER, {**ASSISTANT, "content": "ok"}]
    examples = Encoder(tokenizer, (EOS,)).encode({"messages": messages})
    assert [learnt(tokenizer, example) for example in examples] == [["yo<|im_end|>"], ["ok<|im_end|>"]]
    for example, turn in zip(examples, (1, 3), strict=True):
        prompt = encode_messages(tokenizer, messages[:turn])
        assert example.input_ids[: len(prompt)] == prompt


def test_a_template_without_end_of_sequence_gets_one(make_tokenizer):
    template = (
        "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    tokenizer = make_tokenizer(template)
    (example,) = Encoder(tokenizer, (EOS,)).encode({"messages": [USER, ASSISTANT]})
    assert learnt(tokenizer, example) == ["yo\n<|im_end|>"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "is not a line of JSON"),
        ('"text"', "must be a JSON object, got str"),
        ('{"prompt": "a"}', "field completion: is missing beside prompt"),
        ('{"question": "a"}', "needs exactly one of messages, prompt+completion, or text; has question"),
        ('{"text": "a", "messages": []}', "has messages and text"),
        ('{"text": 3}', "field text: must be text, got int"),
        ('{"prompt": "a", "completion": ""}', "field completion: must not be empty"),
        ('{"messages": []}', "field messages: must be a list of messages"),
        ('{"messages": [{"role": "user"}]}', "field messages[0].content: must be text"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "has no assistant message"),
        (
            '{"messages": [{"role": "wizard", "content": "a"}, {"role": "assistant", "content": "b"}]}',
            "unknown role wizard",
        ),
    ],
)
def test_a_bad_line_is_named_with_its_field(encoder, tmp_path, line, message):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"text": "fine"}) + "\n\n" + line + "\n")
    with pytest.raises(DataError) as raised:
        load(path, encoder, max_length=100)
    assert str(raised.value).startswith(f"{path}:3: ")
    assert message in str(raised.value)


def test_messages_need_a_chat_template(tmp_path, make_tokenizer):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"messages": [USER, ASSISTANT]}))
    with pytest.raises(DataError, match="no chat template"):
        load(path, Encoder(make_tokenizer(None), (EOS,)), max_length=100)


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_a_file_without_examples_is_refused(encoder, tmp_path, content):
    path = tmp_path / "data.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match="the file is empty"):
        load(path, encoder, max_length=100)


def test_a_missing_file_is_refused(encoder, tmp_path):
    with pytest.raises(DataError, match="cannot read"):
        load(tmp_path / "none.jsonl", encoder, max_length=100)


def test_overlong_examples_are_cut_or_dropped_and_counted(encoder, tmp_path):
    path = tmp_path / "data.jsonl"
    records = [
        {"prompt": "a", "completion": "b"},
        {"prompt": "a", "completion": "b" * 50},
        {"prompt": "a" * 50, "completion": "b"},  # cut, it would have nothing left to learn
    ]
    path.write_text("\n".join(map(json.dumps, records)))
    cut = load(path, encoder, max_length=10)
    assert [len(example.input_ids) for example in cut.examples] == [3, 10]
    assert (cut.num_truncated, cut.num_dropped) == (1, 1)
    dropped = load(path, encoder, max_length=10, overlong="drop")
    assert [len(example.input_ids) for example in dropped.examples] == [3]
    assert (dropped.num_truncated, dropped.num_dropped) == (0, 2)


def test_the_split_is_the_seeds_alone():
    examples = [Example([i], [i]) for i in range(20)]
    train, held_out = split(examples, 0.1, seed=1)
    assert (len(train), len(held_out)) == (18, 2)
    assert sorted(example.input_ids[0] for example in train + held_out) == list(range(20))
    assert split(examples, 0.1, seed=1) == (train, held_out)
    assert split(examples, 0.1, seed=2) != (train, held_out)


@pytest.mark.parametrize(
    ("count", "fraction", "held_out"), [(5, 0.1, 1), (1, 0.5, 0), (2, 0.9, 1), (5, 0.0, 0)]
)
def test_small_files_keep_an_example_on_either_side(count, fraction, held_out):
    examples = [Example([i], [i]) for i in range(count)]
    assert len(split(examples, fraction, seed=0)[1]) == held_out
