"""One line per event on standard error, and no values of local variables in a traceback."""

from __future__ import annotations

import json
import logging

import pytest
import structlog
from hotswap_server.logging import configure_logging


@pytest.fixture(autouse=True)
def restored_logging():
    root, ours = logging.getLogger(), logging.getLogger("hotswap_server")
    handlers, levels = root.handlers[:], (root.level, ours.level)
    yield
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    ours.setLevel(levels[1])
    structlog.reset_defaults()


def fail_with_a_local_variable():
    prompt = "a secret"
    try:
        raise RuntimeError(f"failed after {len(prompt)} characters")
    except RuntimeError:
        structlog.get_logger("hotswap_server.test").exception("failed")


def test_json_is_one_object_per_line_for_every_library(capsys):
    configure_logging("info", "json")
    structlog.get_logger("hotswap_server.test").info("event", number=1)
    logging.getLogger("elsewhere").warning("said %s", "this")
    logging.getLogger("elsewhere").info("not this")
    fail_with_a_local_variable()
    captured = capsys.readouterr()
    first, second, third = [json.loads(line) for line in captured.err.splitlines()]
    assert (first["event"], first["number"], first["level"]) == ("event", 1, "info")
    assert (second["event"], second["logger"]) == ("said this", "elsewhere")
    assert "RuntimeError: failed after 8 characters" in third["exception"]
    assert captured.out == ""


@pytest.mark.parametrize("form", ["json", "console"])
def test_tracebacks_show_no_values(capsys, form):
    configure_logging("info", form)
    fail_with_a_local_variable()
    assert 'prompt = "a secret"' not in capsys.readouterr().err.replace("'", '"')


def test_levels_hold_for_our_own_events(capsys):
    configure_logging("error", "console")
    structlog.get_logger("hotswap_server.test").warning("not this")
    structlog.get_logger("hotswap_server.test").error("but this")
    shown = capsys.readouterr().err
    assert "but this" in shown
    assert "not this" not in shown
