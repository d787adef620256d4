"""Patterns of a configuration: as `re` reads them, in bounded time."""

from __future__ import annotations

import re
import time
from contextlib import suppress

import pytest
from hotswap_server.adapters import patterns
from hotswap_server.adapters.patterns import Pattern, ends_with, pattern_budget
from hotswap_server.errors import AdapterInvalidError
from hypothesis import given
from hypothesis import strategies as st

MODULE = "model.layers.10.self_attn.q_proj"
# A hundred million ways, of which none leads anywhere.
SLOW = r"(\w*\.?\w*)*(\w*\.?\w*)*(\w*\.?\w*)*(\w*\.?\w*)*(?<=x)"
USUAL = (
    r".*\.layers\.1\d\..*(q|gate)_proj",
    r"model.*\.(q|k|v)_proj",
    r"^(?!.*visual)(?=.*self_attn).*q_proj.*",
    r"(?:.*?(?:language|model).*?(?:self_attn|mlp).*?(?:q_proj|k_proj)).*?",
    r"model\.layers\.\d{1,3}\.self_attn\.q_proj",
    r"(?i)MODEL\..*",
    r"(?P<a>m)odel.*",
    r"layers",
)


@pytest.mark.parametrize("text", USUAL)
def test_usual_patterns_mean_what_they_mean_to_re(text):
    for name in (MODULE, "model.layers.2.mlp.gate_proj", "visual.self_attn.q_proj", "layers"):
        assert Pattern("f", text).fullmatch(name) == (re.fullmatch(text, name) is not None)
        assert (Pattern("f", text).match(name) is None) == (re.match(text, name) is None)


parts = st.text("abX.-_1", min_size=1, max_size=4)


@given(
    pattern=st.text("abX._|(-)?*1", max_size=6), module=st.lists(parts, min_size=1, max_size=3).map(".".join)
)
def test_ends_are_those_that_peft_finds(pattern, module):
    try:
        expected = re.match(rf"(.*\.)?({pattern})$", module) is not None
    except re.error:  # PEFT could not have trained with it; `regex` knows a few more forms
        with suppress(AdapterInvalidError):
            ends_with("f", pattern, module)
        return
    assert ends_with("f", pattern, module) is expected


REFUSED = (
    *("(", "a**", "[", "(?<=a*", "\\", "a" * 3000, "{x}", "(?R)x(", "(?(5)a|b)", "(" * 500 + ")" * 500),
    *("(a{100}){100}" * 9, "a{99999}", "((((a{50}){50}){50}){50})", "a{99999999999999}"),
    *("(?:model){e<=3}", "[[:alpha:]]+"),
)


@pytest.mark.parametrize("text", REFUSED, ids=lambda text: text[:20])
def test_what_is_no_pattern_or_another_to_others_is_refused_at_once(text):
    started = time.monotonic()
    with pytest.raises(AdapterInvalidError, match=r"adapter_config\.json: f holds"):
        Pattern("f", text)
    assert time.monotonic() - started < 20  # written out, some would take hours


def test_patterns_that_never_end_are_ended(monkeypatch):
    monkeypatch.setattr(patterns, "BUDGET_S", 0.2)
    with pattern_budget():
        slow = Pattern("f", SLOW)
        with pytest.raises(AdapterInvalidError, match=r"take over 0\.2 s"):
            any(slow.fullmatch(MODULE * 20) for _ in range(100_000))
        with pytest.raises(AdapterInvalidError, match="take over"):  # the others share what is left
            Pattern("g", "x").match(MODULE)
    Pattern("g", "x").match(MODULE)
