"""Keys, patterns, and the file that holds them."""

from __future__ import annotations

import json
import os
import stat
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import yaml
from hotswap_server.errors import UnauthenticatedError
from hotswap_server.security.access import Access, Shown
from hotswap_server.security.keys import ApiKey
from hotswap_server.security.keys_file import KeysFileError, read_keys
from hotswap_server.security.principals import ANYBODY, AdapterPatterns, Role
from structlog.testing import capture_logs
from support.keys import Keyring


@pytest.fixture(params=["keys.yaml", "keys.json"])
def keyring(request, tmp_path):
    return Keyring(tmp_path / request.param)


def shown(metadata) -> Shown:
    return Shown(tuple(value for _, value in metadata))


def test_keys_are_random_long_and_out_of_sight():
    keys = [ApiKey.create() for _ in range(100)]
    assert len({key.text for key in keys}) == len({key.id for key in keys}) == 100
    for key in keys:
        assert ApiKey.parse(key.text) == key
        assert key.text not in repr(key)
        assert len(key.text) == 3 + 16 + 1 + 43  # 43 characters of base64 are 32 bytes
        assert key.matches(key.hash)
        assert not key.matches(keys[0].hash) or key is keys[0]
        assert not key.matches(None)
    assert not ApiKey("0" * 16, "x").matches("0" * 64)


@pytest.mark.parametrize(
    "text", ["", "hs_", "hs_0123456789abcdef_", "x" * 10**6, "hs_0123456789ABCDEF_" + "x" * 43]
)
def test_what_has_not_the_form_of_a_key_is_none(text):
    assert ApiKey.parse(text) is None


@pytest.mark.parametrize(
    ("patterns", "matching", "others"),
    [
        ([], [], ["acme/one"]),
        (["*"], ["acme/one", "x/y"], ["", "acme", "a/b/c", "../x", "acme/one@1"]),
        (
            ["acme/*"],
            ["acme/one", "acme/t.w-o_3"],
            ["acmecorp/one", "ACME/one", "globex/acme", "acme/", "acme/a/b"],
        ),
        (["acme/o?e", "globex/two"], ["acme/one", "acme/oae", "globex/two"], ["acme/oe", "globex/twos"]),
        (["acme-*/chat*"], ["acme-eu/chat", "acme-/chat2"], ["acme/chat", "acme-eu/nochat"]),
        (["a.c/x"], ["a.c/x"], ["abc/x"]),
    ],
)
def test_patterns(patterns, matching, others):
    adapters = AdapterPatterns(tuple(patterns))
    assert [name for name in matching + others if adapters.match(name)] == matching


@pytest.mark.parametrize(
    "pattern", ["", "acme", "a/b/c", "acme/[ab]", "**", "/x", "acme/", "acme/ x", "ácme/*"]
)
def test_patterns_that_would_mean_something_else_are_refused(pattern):
    with pytest.raises(ValueError, match="TENANT/NAME"):
        AdapterPatterns((pattern,))


def test_roles_include_those_before():
    assert Role.of("user") < Role.of("publisher") < Role.of("ADMIN")
    with pytest.raises(ValueError, match="user, publisher, admin"):
        Role.of("root")


def test_a_key_is_who_the_file_says(keyring):
    one = keyring.add("acme", "publisher", "acme/*", requests_per_second=2.5, tokens_per_minute=100)
    two = keyring.add("globex")
    access = Access(keyring.path)
    principal = access.authenticate(shown(one))
    assert (principal.name, principal.role, principal.adapters.patterns) == (
        "acme",
        Role.PUBLISHER,
        ("acme/*",),
    )
    assert (principal.limits.requests_per_second, principal.limits.tokens_per_minute) == (2.5, 100)
    assert principal.limits.concurrent_requests is None
    assert access.authenticate(shown(two)).name == "globex"
    assert access.required


def test_without_a_file_everybody_is_anybody():
    access = Access()
    assert access.authenticate(Shown()) is ANYBODY
    assert not access.required


def test_an_expired_key_is_told_so_but_only_to_its_holder(keyring):
    now = datetime.now(UTC)
    old = keyring.add("old", expires=now - timedelta(seconds=1))
    new = keyring.add("new", expires=now + timedelta(hours=1))
    access = Access(keyring.path)
    assert access.authenticate(shown(new)).name == "new"
    with pytest.raises(UnauthenticatedError, match=r"has expired"):
        access.authenticate(shown(old))
    ((_, value),) = old
    with pytest.raises(UnauthenticatedError, match=r"not one of this server's"):
        access.authenticate(Shown((value[:-3] + "xxx",)))


def test_certificate_names_are_matched_whole_and_a_key_goes_first(keyring):
    metadata = keyring.add("by-key")
    keyring.add_certificate("svc.acme.internal", "by-name", "admin", "*")
    keyring.add_certificate("spiffe://acme/svc", "by-uri")
    access = Access(keyring.path)
    names = ("svc.acme.internal", "something")
    assert access.authenticate(Shown(certificate_names=names)).name == "by-name"
    assert access.authenticate(Shown(certificate_names=("x", "spiffe://acme/svc"))).name == "by-uri"
    assert access.authenticate(Shown(shown(metadata).authorizations, names)).name == "by-key"
    for names in ((), ("acme.internal",), ("SVC.acme.internal",), ("*",)):
        with pytest.raises(UnauthenticatedError):
            access.authenticate(Shown(certificate_names=names))
    with pytest.raises(UnauthenticatedError):  # a wrong key is wrong, whatever the certificate
        access.authenticate(Shown(("Bearer x",), ("svc.acme.internal",)))


def test_changes_are_taken_over_and_a_broken_file_changes_nothing(keyring):
    one = keyring.add("one")
    access = Access(keyring.path)
    two = keyring.add("two")
    keyring.revoke("one")
    access.refresh()
    assert access.authenticate(shown(two)).name == "two"
    with pytest.raises(UnauthenticatedError):
        access.authenticate(shown(one))
    good = keyring.path.read_bytes()
    for broken in (b"{", b"keys: 3", b"[1]", good + b"x"):
        keyring.path.write_bytes(broken)
        with capture_logs() as logs:
            access.refresh()
            access.refresh()
        assert [line["event"] for line in logs] == ["keys_file_unusable"]
        assert access.authenticate(shown(two)).name == "two"
    keyring.path.unlink()
    access.refresh()
    assert access.authenticate(shown(two)).name == "two"
    keyring.path.write_bytes(good)
    keyring.revoke("two")
    access.refresh()
    with pytest.raises(UnauthenticatedError):
        access.authenticate(shown(two))


def test_the_file_holds_no_key_and_is_its_owners(keyring):
    ((_, value),) = keyring.add("acme")
    key = value.removeprefix("Bearer ")
    assert key[20:] not in keyring.path.read_text()
    assert stat.S_IMODE(keyring.path.stat().st_mode) == 0o600
    keyring.path.chmod(0o644)
    keyring.add("globex")
    assert stat.S_IMODE(keyring.path.stat().st_mode) == 0o600
    assert [path.name for path in keyring.path.parent.iterdir() if path.name.endswith(".tmp")] == []


def test_a_file_that_everybody_may_write_is_refused(keyring):
    keyring.add("acme")
    keyring.path.chmod(0o666)
    with pytest.raises(KeysFileError, match="chmod 600"):
        Access(keyring.path)


def test_writers_wait_for_each_other(tmp_path):
    keyring = Keyring(tmp_path / "keys.json")
    threads = [threading.Thread(target=keyring.add, args=(f"p{number}",)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {key.principal for key in read_keys(keyring.path).keys} == {f"p{number}" for number in range(8)}


def test_a_writer_that_fails_leaves_the_file_alone(keyring, monkeypatch):
    keyring.add("acme")
    before = keyring.path.read_bytes()
    monkeypatch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(KeysFileError, match="No space left"):
        keyring.add("globex")
    monkeypatch.undo()
    assert keyring.path.read_bytes() == before
    assert len([path for path in keyring.path.parent.iterdir() if not path.name.endswith(".lock")]) == 1


ENTRY = {"id": "0" * 16, "hash": "0" * 64, "principal": "acme"}


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({"key": []}, "key"),
        ({"keys": [ENTRY | {"role": "root"}]}, "keys.0.role"),
        ({"keys": [ENTRY, ENTRY]}, "twice"),
        ({"keys": [ENTRY | {"hash": "secret"}]}, "keys.0.hash"),
        ({"keys": [ENTRY | {"id": "../x"}]}, "keys.0.id"),
        ({"keys": [ENTRY | {"adapters": "acme/*"}]}, "keys.0.adapters"),
        ({"keys": [ENTRY | {"adapters": ["acme"]}]}, "keys.0.adapters"),
        ({"keys": [ENTRY | {"expires": "2030-01-01T00:00:00"}]}, "keys.0.expires"),
        ({"keys": [ENTRY | {"requests_per_second": 0}]}, "keys.0.requests_per_second"),
        ({"keys": [ENTRY | {"principal": "a\nb"}]}, "keys.0.principal"),
        ({"keys": [ENTRY | {"typo": 1}]}, "keys.0.typo"),
        ({"certificates": [{"principal": "acme"}]}, "certificates.0.subject"),
        ([], "must map"),
    ],
)
@pytest.mark.parametrize("suffix", [".json", ".yaml"])
def test_a_wrong_entry_is_named_in_one_line(tmp_path, content, named, suffix):
    path = tmp_path / f"keys{suffix}"
    path.write_text(json.dumps(content) if suffix == ".json" else yaml.safe_dump(content))
    with pytest.raises(KeysFileError) as caught:
        read_keys(path)
    message = str(caught.value)
    assert named in message
    assert str(path) in message
    assert "\n" not in message
    assert "secret" not in message


def test_the_example_is_one():
    example = read_keys(Path(__file__).parents[3] / "examples" / "keys.yaml")
    assert [entry.principal for entry in (*example.keys, *example.certificates)] == [
        *("acme-prod", "operator", "globex")
    ]


def test_times_without_quotes_and_an_empty_file_are_read(tmp_path):
    path = tmp_path / "keys.yaml"
    path.write_text("")
    assert read_keys(path).keys == ()
    path.write_text(
        f"keys:\n- {{id: '{'0' * 16}', hash: '{'0' * 64}', principal: acme, expires: 2030-01-01T00:00:00Z}}\n"
        "certificates:\n"
    )
    assert read_keys(path).keys[0].expires == datetime(2030, 1, 1, tzinfo=UTC)
