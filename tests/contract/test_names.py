import dataclasses

import pytest
from hotswap.names import AdapterName, InvalidAdapterNameError, parse_version
from hypothesis import given
from hypothesis import strategies as st


@pytest.mark.parametrize("text", ["acme/support", "a/b", "0/1", "A-b_c.d/x-1.2_3", f"{'t' * 64}/{'n' * 64}"])
def test_a_valid_name_is_spelled_as_it_was_parsed(text):
    name = AdapterName.parse(text)
    assert str(name) == text
    assert (name.tenant, name.name) == tuple(text.split("/"))


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("", "tenant/name"),
        ("acme", "tenant/name"),
        ("acme/support/3", "tenant/name"),
        ("/etc/passwd", "tenant/name"),
        ("/support", "tenant .* must not be empty"),
        ("acme/", "name .* must not be empty"),
        ("../support", "tenant .* must start"),
        ("acme/..", "name .* must start"),
        ("acme/a..b", "two dots in a row"),
        ("acme/.hidden", "must start"),
        ("acme/-rf", "must start"),
        ("acme/support.", "must not end with a dot"),
        ("acme\\evil/support", "only ASCII"),
        ("acme/sup port", "only ASCII"),
        ("acme/support\n", "only ASCII"),
        ("acme/sup\x00port", "only ASCII"),
        ("acme/suppоrt", "only ASCII"),  # a Cyrillic letter  # noqa: RUF001
        ("acme/ſupport", "must start"),  # folds to an ASCII s  # noqa: RUF001
        ("acme/٣", "must start"),
        ("acme/a\u202eb", "only ASCII"),
        ("acme/a%2e", "only ASCII"),
        ("acme/support@3", "only ASCII"),
        (f"acme/{'n' * 65}", "at most 64"),
    ],
)
def test_a_broken_rule_is_named(text, rule):
    with pytest.raises(InvalidAdapterNameError, match=rule) as caught:
        AdapterName.parse(text)
    assert str(caught.value).isascii()
    assert str(caught.value).isprintable()


def test_no_invalid_name_can_be_made_without_parse():
    with pytest.raises(InvalidAdapterNameError):
        AdapterName("acme", "../x")
    with pytest.raises(InvalidAdapterNameError):
        dataclasses.replace(AdapterName("acme", "x"), tenant="/")


def test_a_version_is_optional():
    name = AdapterName("acme", "support")
    assert AdapterName.parse_versioned("acme/support") == (name, None)
    assert AdapterName.parse_versioned("acme/support@3") == (name, 3)


@pytest.mark.parametrize(
    "version", ["", "0", "-1", "+1", "03", "1.0", " 1", "1_0", "٣", "latest", "3@4", "2147483648"]
)
def test_a_version_is_a_canonical_positive_number(version):
    with pytest.raises(InvalidAdapterNameError, match="version"):
        AdapterName.parse_versioned(f"acme/support@{version}")


@given(st.text(max_size=12))
def test_a_version_has_one_spelling(text):
    version = parse_version(text)
    assert version is None or (str(version) == text and 1 <= version < 2**31)


@given(st.text(alphabet="aZ0._-/@\\\n\x00é٣", max_size=10))
def test_whatever_parses_stays_inside_a_directory(text):
    try:
        name = AdapterName.parse(text)
    except InvalidAdapterNameError:
        return
    assert str(name) == text
    for part in (name.tenant, name.name):
        assert part.isascii()
        assert not part.startswith(".")
        assert not set(part) & set("/\\@\n\x00")
