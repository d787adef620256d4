"""`hotswap keys`."""

from __future__ import annotations

import pytest
from hotswap_server.errors import UnauthenticatedError
from hotswap_server.security.access import Access, Shown
from hotswap_server.security.keys_file import read_keys
from hotswap_server.security.verbs import app
from typer.testing import CliRunner


@pytest.fixture
def file(tmp_path):
    return tmp_path / "keys.yaml"


@pytest.fixture
def keys(file, monkeypatch):
    monkeypatch.setenv("HOTSWAP_SERVE_KEYS_FILE", str(file))
    monkeypatch.setenv("COLUMNS", "250")
    return lambda *arguments, **options: CliRunner().invoke(app, list(map(str, arguments)), **options)


def test_a_created_key_opens_until_it_is_revoked(keys, file):
    made = keys(
        "create",
        "acme-prod",
        "--role",
        "publisher",
        "--adapters",
        "acme/*",
        "--adapters",
        "demo/?",
        "--rate",
        2,
        "--tokens-per-minute",
        6000,
        "--concurrency",
        3,
        "--expires",
        "30d",
    )
    assert made.exit_code == 0, made.output
    key = made.stdout.strip()
    principal = Access(file).authenticate(Shown((f"Bearer {key}",)))
    assert (principal.name, str(principal.role), principal.adapters.patterns) == (
        "acme-prod",
        "publisher",
        ("acme/*", "demo/?"),
    )
    limits = principal.limits
    assert (limits.requests_per_second, limits.tokens_per_minute, limits.concurrent_requests) == (2, 6000, 3)
    assert key.split("_")[1] in made.stderr
    listed = keys("list").stdout
    for part in ("acme-prod", "publisher", "acme/*, demo/?", "2 requests/s, 6000 tokens/min, 3 at once"):
        assert part in listed
    assert key.split("_")[1] in keys("list", env={"COLUMNS": "60"}).stdout
    assert key.split("_")[2] not in listed + file.read_text()
    assert keys("revoke", key.split("_")[1]).exit_code == 0
    with pytest.raises(UnauthenticatedError):
        Access(file).authenticate(Shown((f"Bearer {key}",)))


def test_revoking_a_name_revokes_all_its_keys(keys, file):
    for name in ("acme", "acme", "globex"):
        keys("create", name)
    result = keys("revoke", "acme")
    assert result.stdout.count("revoked") == 2
    assert [key.principal for key in read_keys(file).keys] == ["globex"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("create", "acme", "--role", "root"), "--role: must be user, publisher, admin"),
        (("create", "acme", "--adapters", "acme"), "--adapters"),
        (("create", "acme", "--rate", "0"), "--rate"),
        (("create", "acme", "--expires", "soon"), "--expires"),
        (("create", "acme", "--expires", "2020-01-01"), "--expires"),
        (("create", "a b"), "NAME"),
        (("revoke", "nobody"), "nobody"),
        (("list",), "cannot be read"),
    ],
)
def test_mistakes_are_named_and_change_nothing(keys, file, arguments, named):
    result = keys(*arguments)
    assert result.exit_code == 2
    assert named in result.stderr
    assert "Traceback" not in result.output
    assert not file.exists()
