import json

import pytest
from hotswap.aliases import AliasFileError, AliasHistoryError, AliasTable, Target
from hotswap.names import AdapterName, AdapterReference, InvalidAdapterNameError
from hypothesis import given, settings
from hypothesis import strategies as st

versions = st.integers(1, 2**31 - 1)
targets = versions.map(Target) | st.builds(
    lambda pair, percent: Target(pair[0], pair[1], percent),
    st.tuples(versions, versions).filter(lambda pair: pair[0] != pair[1]),
    st.floats(0.01, 99.99),
)
aliases = st.from_regex(r"[a-z][a-z0-9_-]{0,8}", fullmatch=True)


@settings(max_examples=30)
@given(st.lists(st.tuples(aliases, targets | st.none()), max_size=8))
def test_a_table_is_what_it_was_written_from(changes):
    table = AliasTable()
    for alias, target in changes:
        table = table.set(alias, target)
    assert AliasTable.parse(table.to_json()) == table


@given(targets, st.text(), aliases)
def test_a_key_gets_one_version_and_keeps_it_as_the_share_grows(target, key, salt):
    chosen = target.choose(key, salt)
    assert chosen == target.choose(key, salt)
    assert chosen in target.versions
    assert target.choose(None, salt) == target.version
    if target.canary is not None and chosen == target.canary:
        larger = Target(target.version, target.canary, (target.percent + 100) / 2)
        assert larger.choose(key, salt) == target.canary


@pytest.mark.parametrize("percent", [5.0, 50.0, 0.5])
def test_the_share_of_a_canary_is_that_of_its_keys(percent):
    target = Target(3, 4, percent)
    got = sum(target.choose(f"request-{i}", "acme/support@stable") == 4 for i in range(20_000)) / 200
    assert got == pytest.approx(percent, abs=4 * (percent * (100 - percent) / 20_000) ** 0.5)


def test_another_alias_has_other_keys_in_its_canary():
    target = Target(3, 4, 10)
    chosen = [
        {key for key in map(str, range(1000)) if target.choose(key, salt) == 4} for salt in ("a/b@x", "a/b@y")
    ]
    assert len(chosen[0] & chosen[1]) < 0.3 * len(chosen[0])


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ((0,), "version must be between"),
        ((2**31,), "version must be between"),
        ((1, 1, 5), "another version"),
        ((1, 0, 5), "canary must be between"),
        ((1, 2, 0), "share"),
        ((1, 2, 100), "share"),
        ((1, 2, float("nan")), "share"),
        ((1, None, 5), "needs a canary"),
    ],
)
def test_a_target_that_makes_no_sense_is_refused(arguments, problem):
    with pytest.raises(ValueError, match=problem):
        Target(*arguments)


def test_rolling_back_goes_through_what_an_alias_was():
    table = AliasTable().set("stable", Target(1)).set("stable", Target(2)).set("stable", Target(2, 3, 5))
    seen = []
    for _ in range(3):
        table = table.rolled_back("stable")
        seen.append(table.targets.get("stable"))
    assert seen == [Target(2), Target(1), None]
    with pytest.raises(AliasHistoryError, match="stable has no earlier"):
        table.rolled_back("stable")


def test_a_table_stays_small():
    table = AliasTable()
    for alias in range(500):
        for version in range(1, 12):
            table = table.set(f"a{alias}", Target(version))
        table = table.set(f"a{alias}", None)
    assert len(table.to_json()) < 200_000
    for alias in range(64):
        table = table.set(f"b{alias}", Target(1))
    with pytest.raises(ValueError, match="at most 64"):
        table.set("c", Target(1))


@pytest.mark.parametrize(
    "content",
    [
        b"\xff",
        b"[]",
        b"{}",
        b'{"hotswap": 2}',
        b'{"hotswap": 1, "aliases": []}',
        b'{"hotswap": 1, "aliases": {"../x": {"version": 1}}}',
        b'{"hotswap": 1, "aliases": {"7": {"version": 1}}}',
        b'{"hotswap": 1, "aliases": {"a": {"version": "1"}}}',
        b'{"hotswap": 1, "aliases": {"a": {"version": true}}}',
        b'{"hotswap": 1, "aliases": {"a": 3}}',
        b'{"hotswap": 1, "aliases": {"a": {"version": 1, "canary": {"version": 2}}}}',
        b'{"hotswap": 1, "aliases": {"a": {"version": 1, "canary": {"version": 2, "percent": 101}}}}',
        b'{"hotswap": 1, "aliases": {"a": {"version": 1, "canary": {"version": 1, "percent": 5}}}}',
        b"[" * 100_000,
    ],
)
def test_what_is_no_alias_file_is_refused(content):
    with pytest.raises(AliasFileError):
        AliasTable.parse(content)


def test_an_alias_file_may_hold_what_later_versions_add():
    content = {"hotswap": 1, "aliases": {"a": {"version": 1, "note": "x"}}, "more": 1}
    assert AliasTable.parse(json.dumps(content).encode()).targets == {"a": Target(1)}


@pytest.mark.parametrize(
    ("text", "version", "alias"),
    [("acme/support", None, None), ("acme/support@3", 3, None), ("acme/support@stable", None, "stable")],
)
def test_a_reference_has_a_version_or_an_alias_or_neither(text, version, alias):
    reference = AdapterReference.parse(text)
    assert reference == AdapterReference(AdapterName("acme", "support"), version, alias)
    assert str(reference) == text


@pytest.mark.parametrize(
    "text",
    [
        *("acme/support@", "acme/support@0", "acme/support@01", "acme/support@3x", "acme/support@-1"),
        *(
            "acme/support@Stable",
            "acme/support@../x",
            "acme/support@a/b",
            "acme/support@a.b",
            "acme/support@.a",
        ),
        *(
            "acme/support@\u017ftable",
            "acme/support@stable\u200b",
            "acme/support@\uff11",
            "acme/support@a\x00",
        ),
        *("acme/support@a@b", "acme@stable", "@stable", "acme/support@" + "a" * 65, "acme/../x@stable"),
    ],
)
def test_what_is_no_reference_is_refused(text):
    with pytest.raises(InvalidAdapterNameError):
        AdapterReference.parse(text)
