"""Certificates on disk: what is refused at start, and what a rotation does."""

from __future__ import annotations

import os

import pytest
from cryptography.hazmat.primitives import serialization
from hotswap_server.config import SettingsError, load_settings
from hotswap_server.security.setup import (
    SecuritySettingsError,
    exposure_warnings,
    is_loopback,
    open_security,
)
from hotswap_server.security.tls import ServerCertificates, TLSFiles, TLSFilesError
from structlog.testing import capture_logs
from support.certificates import Authority


@pytest.fixture(scope="module")
def authority():
    return Authority()


@pytest.fixture
def files(authority, tmp_path):
    authority.issue("server", "localhost").write(tmp_path, "server")
    (tmp_path / "ca.crt").write_bytes(authority.cert)
    return TLSFiles(tmp_path / "server.crt", tmp_path / "server.key", tmp_path / "ca.crt")


def settings(**flags):
    return load_settings(store="s", **flags)


def test_what_does_not_go_together_is_refused_at_start(authority, files, tmp_path):
    ServerCertificates(files)
    other = authority.issue("other")
    key = serialization.load_pem_private_key(other.key, None)
    secret = serialization.BestAvailableEncryption(b"secret")
    locked = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, secret)
    for content in (other.key, locked, b"", b"nonsense"):
        files.key.write_bytes(content)
        with pytest.raises(TLSFilesError, match=r"server\.crt and .*server\.key") as caught:
            ServerCertificates(files)
        assert caught.value.field == "tls_cert"
        assert "\n" not in str(caught.value)
    authority.issue("server").write(tmp_path, "server")
    for content in (b"", b"nonsense", b"\xff"):
        files.client_ca.write_bytes(content)
        with pytest.raises(TLSFilesError) as caught:
            ServerCertificates(files)
        assert caught.value.field == "tls_client_ca"
    files.cert.unlink()
    with pytest.raises(TLSFilesError, match="No such file"):
        ServerCertificates(files)


def test_a_change_is_read_once_and_half_a_rotation_not_at_all(authority, files, tmp_path):
    certificates = ServerCertificates(files)
    assert certificates._changed() is None
    new = authority.issue("server", "localhost")
    files.cert.write_bytes(new.cert)
    with capture_logs() as logs:
        assert certificates._changed() is None
        assert certificates._changed() is None
    assert [line["event"] for line in logs] == ["tls_files_unusable"]
    files.key.write_bytes(new.key)
    assert certificates._changed() is not None
    assert certificates._changed() is None
    files.cert.unlink()
    assert certificates._changed() is None
    files.cert.write_bytes(new.cert)
    os.utime(files.cert, ns=(1, 1))
    assert certificates._changed() is not None


def test_settings_that_need_each_other():
    for flags, named in (
        ({"tls_cert": "x"}, "tls_key"),
        ({"tls_key": "x"}, "tls_key"),
        ({"tls_client_ca": "x"}, "tls_client_ca"),
        ({"admin_host": "::1"}, "admin_host"),
    ):
        with pytest.raises(SettingsError, match=named):
            settings(**flags)


def test_files_are_opened_and_named_by_their_setting(files, tmp_path):
    opened = open_security(settings())
    assert opened.certificates is None
    assert not opened.access.required
    assert opened.summary == "no TLS, every caller may do all"
    (tmp_path / "keys.yaml").write_text("keys: []")
    given = {"tls_cert": files.cert, "tls_key": files.key, "keys_file": tmp_path / "keys.yaml"}
    assert open_security(settings(**given)).summary == "TLS, known callers only"
    mutual = open_security(settings(tls_client_ca=files.client_ca, **given))
    assert mutual.summary == "TLS with client certificates, known callers only"
    for field in ("tls_cert", "keys_file"):
        with pytest.raises(SecuritySettingsError) as caught:
            open_security(settings(**(given | {field: tmp_path / "none"})))
        assert caught.value.field == field


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ({}, []),
        ({"host": "::1"}, []),
        ({"host": "localhost"}, []),
        ({"host": "0.0.0.0"}, ["every adapter", "prompts and answers"]),
        ({"host": "::"}, ["every adapter", "prompts and answers"]),
        ({"host": "10.0.0.1", "keys_file": "k"}, ["API keys, prompts"]),
        ({"host": "10.0.0.1", "tls_cert": "c", "tls_key": "k"}, ["every adapter"]),
        ({"host": "10.0.0.1", "tls_cert": "c", "tls_key": "k", "tls_client_ca": "a"}, []),
        ({"host": "10.0.0.1", "tls_cert": "c", "tls_key": "k", "keys_file": "f"}, []),
        ({"admin_port": 1, "admin_host": "0.0.0.0"}, ["every adapter", "prompts and answers"]),
    ],
)
def test_warnings_of_what_others_can_do(flags, parts):
    warnings = exposure_warnings(settings(**flags))
    assert len(warnings) == len(parts)
    for warning, part in zip(warnings, parts, strict=True):
        assert part in warning


def test_what_is_loopback():
    assert all(is_loopback(host) for host in ("localhost", "127.0.0.1", "127.9.9.9", "::1", "[::1]"))
    assert not any(is_loopback(host) for host in ("0.0.0.0", "::", "10.0.0.1", "localhost.example", ""))
