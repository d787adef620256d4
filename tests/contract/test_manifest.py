import hashlib
import json

import pytest
from hotswap.layout import CONFIG_FILE, MANIFEST_FILE, WEIGHTS_FILE, content_digest
from hotswap.manifest import FileRecord, Manifest, ManifestError

SHA = hashlib.sha256(b"x").hexdigest()


def write(directory):
    (directory / CONFIG_FILE).write_bytes(b"{}")
    (directory / WEIGHTS_FILE).write_bytes(b"w" * 1000)
    (directory / "notes").mkdir()
    (directory / "notes/a b.md").write_bytes(b"x")
    (directory / ".hidden").touch()
    (directory / MANIFEST_FILE).write_bytes(b"an old one")
    (directory / "link").symlink_to(CONFIG_FILE)


def test_a_manifest_lists_the_files_and_gives_the_digest(tmp_path):
    write(tmp_path)
    manifest = Manifest.of_directory(tmp_path)
    assert set(manifest.files) == {CONFIG_FILE, WEIGHTS_FILE, "notes/a b.md"}
    assert manifest.files["notes/a b.md"] == FileRecord(1, SHA)
    assert manifest.digest == content_digest(b"{}", b"w" * 1000)
    assert Manifest.parse(manifest.to_json()) == manifest


def test_what_is_no_adapter_has_no_digest(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"x")
    manifest = Manifest.of_directory(tmp_path)
    assert manifest.digest is None
    assert Manifest.parse(manifest.to_json()) == manifest


@pytest.mark.parametrize(
    "name", ["../x", "/etc/x", "a/../b", "a//b", ".x", "a/.b", "", "a\\b", "a\x00", "a/"]
)
def test_a_path_that_leaves_the_version_is_refused(name):
    content = {"hotswap": 1, "digest": None, "files": {name: {"bytes": 1, "sha256": SHA}}}
    with pytest.raises(ManifestError, match="names a file"):
        Manifest.parse(json.dumps(content).encode())


@pytest.mark.parametrize(
    "change",
    [
        {"hotswap": 2},
        {"files": {}},
        {"files": []},
        {"files": {"a": {"bytes": -1, "sha256": SHA}}},
        {"files": {"a": {"bytes": True, "sha256": SHA}}},
        {"files": {"a": {"bytes": 1, "sha256": SHA.upper()}}},
        {"files": {"a": 1}},
        {"digest": SHA},
    ],
)
def test_what_is_no_manifest_is_refused(change):
    good = {"hotswap": 1, "digest": None, "files": {"a": {"bytes": 1, "sha256": SHA}}}
    assert Manifest.parse(json.dumps(good).encode()).files
    with pytest.raises(ManifestError):
        Manifest.parse(json.dumps(good | change).encode())


@pytest.mark.parametrize("content", [b"", b"\xff", b"[]", b"[" * 100_000])
def test_what_is_no_json_object_is_no_manifest(content):
    with pytest.raises(ManifestError):
        Manifest.parse(content)
