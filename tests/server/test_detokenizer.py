import random

import pytest
from hotswap_server.engine.detokenizer import Detokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models import byte_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

BYTES = byte_tokenizer()


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """Word pieces with a leading mark for a space, and byte fallback, as in Llama 2 and Gemma."""
    words = ["▁the", "▁cat", "s", "▁", "é", "▁日", "本", ".", "▁sat", "\n"]
    tokens = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)], *words]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=[],
            byte_fallback=True,
            unk_token="<unk>",
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


PIECES = sentencepiece_like()


@pytest.fixture(scope="module", params=["bytes", "pieces", "smollm2", "cleaning"])
def any_tokenizer(request):
    if request.param == "smollm2":
        return AutoTokenizer.from_pretrained(request.getfixturevalue("smollm2"))
    if request.param == "cleaning":  # as Llama 3's configuration asks
        tokenizer = byte_tokenizer()
        tokenizer.clean_up_tokenization_spaces = True
        return tokenizer
    return {"bytes": BYTES, "pieces": PIECES}[request.param]


def run(tokenizer, ids: list[int], stop: tuple[str, ...] = ()) -> tuple[list[str], bool]:
    """The texts in the order given out, the last one from `finish`; and whether a stop string ended it."""
    detokenizer = Detokenizer(tokenizer, stop)
    texts = []
    for token in ids:
        text, found = detokenizer.add(token)
        texts.append(text)
        if found:
            return texts, True
    texts.append(detokenizer.finish())
    return texts, False


def random_ids(tokenizer, length: int) -> list[int]:
    """Any tokens; for word pieces those of a text, since bytes that are none have no fixed text there:
    each depends on all that follow."""
    if tokenizer is not PIECES:
        return random.choices(range(len(tokenizer) + 5), k=length)
    text = "".join(random.choices("the cat日本é🎉s.\n ", k=length))
    return PIECES(text, add_special_tokens=False).input_ids


def whole(tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def test_a_character_of_several_tokens_comes_when_it_is_complete():
    ids = BYTES("aé日🎉b", add_special_tokens=False).input_ids
    assert len(ids) == 11
    assert run(BYTES, ids)[0] == ["a", "", "é", "", "", "日", "", "", "", "🎉", "b", ""]


def test_an_unfinished_character_ends_as_a_replacement():
    ids = BYTES("a日", add_special_tokens=False).input_ids[:-1]
    texts, _ = run(BYTES, ids)
    assert texts[:-1] == ["a", "", ""]
    assert "".join(texts) == whole(BYTES, ids)
    assert set(texts[-1]) == {"\N{REPLACEMENT CHARACTER}"}


def test_spaces_before_punctuation_stay(any_tokenizer):
    ids = any_tokenizer("the cats . the cats .", add_special_tokens=False).input_ids
    assert "".join(run(any_tokenizer, ids)[0]) == "the cats . the cats ."


def test_random_tokens_give_the_text_of_the_whole(any_tokenizer):
    random.seed(0)
    for _ in range(300):
        ids = random_ids(any_tokenizer, random.randrange(1, 40))
        texts, _ = run(any_tokenizer, ids)
        assert "".join(texts) == whole(any_tokenizer, ids), ids


def test_random_tokens_give_the_text_of_the_whole_beside_idle_stop_strings(any_tokenizer):
    random.seed(1)
    for _ in range(100):
        ids = random_ids(any_tokenizer, 30)
        texts, found = run(any_tokenizer, ids, ("\n\n never there", "����������never"))
        assert not found
        assert "".join(texts) == whole(any_tokenizer, ids), ids


@settings(max_examples=300, deadline=None)
@given(
    text=st.text(alphabet="abé日🎉", min_size=1, max_size=30),
    stop=st.lists(st.text(alphabet="abé日", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_text_ends_before_the_first_stop_string(text, stop):
    ids = BYTES(text, add_special_tokens=False).input_ids
    texts, found = run(BYTES, ids, tuple(stop))
    places = [(index + len(s), index) for s in stop if (index := text.find(s)) >= 0]
    assert found is bool(places)
    if places:
        # The one that is complete first, and of those that end together the longest.
        first_end = min(end for end, _ in places)
        expected = text[: min(start for end, start in places if end == first_end)]
    else:
        expected = text
    assert "".join(texts) == expected
    for index in range(len(texts)):
        assert text.startswith("".join(texts[:index])), "what was given out is never taken back"


def test_what_may_begin_a_stop_string_is_held_back_and_then_released():
    texts, found = run(BYTES, BYTES("a<en<end>z", add_special_tokens=False).input_ids, ("<end>",))
    assert found
    assert texts == ["a", "", "", "", "<en", "", "", "", ""]
    texts, found = run(BYTES, BYTES("a<en", add_special_tokens=False).input_ids, ("<end>",))
    assert not found
    assert texts == ["a", "", "", "", "<en"]


def test_a_stop_string_within_one_token_and_across_tokens(smollm2):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    ids = tokenizer("The quick brown fox.\nNext line", add_special_tokens=False).input_ids
    for stop, expected in (("uick", "The q"), ("own fox", "The quick br"), (".\nN", "The quick brown fox")):
        texts, found = run(tokenizer, ids, (stop,))
        assert found
        assert "".join(texts) == expected


def test_bytes_that_are_no_text_break_nothing():
    random.seed(2)
    for _ in range(200):
        texts, _ = run(PIECES, random.choices(range(len(PIECES)), k=20))
        assert len(texts) == 21


def test_special_tokens_have_no_text():
    assert run(BYTES, [0, *BYTES("hi", add_special_tokens=False).input_ids, 0, 1])[0] == [
        "",
        "h",
        "i",
        "",
        "",
        "",
    ]
