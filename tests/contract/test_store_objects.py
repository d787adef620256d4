"""Publishing into object stores, and what every kind of store does alike."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest
from hotswap import publish_objects
from hotswap.layout import (
    CONFIG_FILE,
    MANIFEST_FILE,
    WEIGHTS_FILE,
    PublishError,
    content_digest,
    existing_versions,
    publish,
)
from hotswap.manifest import MAX_MANIFEST_BYTES, Manifest
from hotswap.names import AdapterName
from hotswap.object_storage import ObjectStorage
from hotswap.storage import StorageError, StoragePackageError, open_storage

NAME = AdapterName("acme", "support")


def write(directory: Path, content: bytes = b"w" * 1000) -> None:
    (directory / CONFIG_FILE).write_bytes(b"{}")
    (directory / WEIGHTS_FILE).write_bytes(content)
    (directory / "README.md").write_text("a card")


@pytest.fixture(params=["memory", "s3"])
def object_url(request):
    return request.getfixturevalue(f"{request.param}_url")


def test_a_version_is_published_with_a_manifest(store_url):
    assert [publish(store_url, NAME, write) for _ in range(2)] == [1, 2]
    storage = open_storage(store_url)
    files = storage.files("acme/support")
    assert set(files) == {
        f"{version}/{file}"
        for version in (1, 2)
        for file in (CONFIG_FILE, WEIGHTS_FILE, MANIFEST_FILE, "README.md")
    }
    manifest = Manifest.parse(storage.read(f"acme/support/2/{MANIFEST_FILE}", MAX_MANIFEST_BYTES).data)
    assert manifest.digest == content_digest(b"{}", b"w" * 1000)
    assert {f"2/{file}": record.size for file, record in manifest.files.items()}.items() <= files.items()


def test_publishers_at_the_same_time_get_different_numbers(object_url):
    barrier = threading.Barrier(4)

    def one(number: int) -> tuple[int, bytes]:
        content = bytes([number]) * 100

        def write_late(directory: Path) -> None:
            write(directory, content)
            barrier.wait()

        return publish(object_url, NAME, write_late), content

    with ThreadPoolExecutor(4) as pool:
        published = dict(pool.map(one, range(4)))
    assert sorted(published) == [1, 2, 3, 4]
    storage = open_storage(object_url)
    for version, content in published.items():
        assert storage.read(f"acme/support/{version}/{WEIGHTS_FILE}", 1000).data == content
        manifest = Manifest.parse(storage.read(f"acme/support/{version}/{MANIFEST_FILE}", 10_000).data)
        assert manifest.digest == content_digest(b"{}", content)


def test_readers_see_a_version_whole_or_not_at_all(object_url, monkeypatch):
    """After each object that a publisher writes or removes, the store is looked at."""
    publish(object_url, NAME, write)
    storage = open_storage(object_url)
    seen = []

    def look(method):
        def looking(self, *arguments):
            result = method(self, *arguments)
            seen.append(existing_versions(storage.files("acme/support")))
            return result

        return looking

    for method in ("create", "upload", "remove"):
        monkeypatch.setattr(ObjectStorage, method, look(getattr(ObjectStorage, method)))
    publish(object_url, NAME, write)
    assert seen == [[1]] * 4 + [[1, 2]] * 2, "claim, three files, manifest, claim removed"


@pytest.mark.parametrize("fails_at", ["create", "upload"])
def test_a_publisher_that_fails_leaves_the_store_as_it_was(object_url, monkeypatch, fails_at):
    publish(object_url, NAME, write)
    storage = open_storage(object_url)
    before = storage.files("")
    method, calls = getattr(ObjectStorage, fails_at), []

    def fail_at_the_second(self, *arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise StorageError("away")
        return method(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(ObjectStorage, fails_at, fail_at_the_second)
        with pytest.raises(StorageError, match="away"):
            publish(object_url, NAME, write)
    assert storage.files("") == before
    assert publish(object_url, NAME, write) == 2


def test_a_dead_publisher_leaves_nothing_to_see_and_is_cleaned_up_after(object_url, monkeypatch):
    storage = open_storage(object_url)

    def die(*arguments, **options):
        raise SystemExit  # and nobody cleans up

    with monkeypatch.context() as patch:
        patch.setattr(ObjectStorage, "remove", die)
        patch.setattr(ObjectStorage, "remove_tree", die)
        patch.setattr(publish_objects, "MANIFEST_FILE", "not/written")
        patch.setattr(Manifest, "to_json", die)
        with pytest.raises(SystemExit):
            publish(object_url, NAME, write)
    assert f"1/{CONFIG_FILE}" in storage.files("acme/support")
    assert existing_versions(storage.files("acme/support")) == []
    assert publish(object_url, NAME, write) == 2, "the claimed number is not taken"
    assert f"1/{CONFIG_FILE}" in storage.files("acme/support"), "it may still be at work"
    monkeypatch.setattr(publish_objects, "CLAIM_AGE_S", -1.0)
    assert publish(object_url, NAME, write) == 3
    assert {path.partition("/")[0] for path in storage.files("acme/support")} == {"2", "3"}


def test_an_incomplete_directory_is_not_uploaded(object_url):
    with pytest.raises(PublishError, match=WEIGHTS_FILE):
        publish(object_url, NAME, lambda directory: (directory / CONFIG_FILE).write_bytes(b"{}"))
    assert open_storage(object_url).files("") == {}


def test_a_storage_without_conditional_puts_is_read_back(memory_url, monkeypatch):
    filesystem = fsspec.filesystem("memory")
    pipe_file = type(filesystem).pipe_file

    def ignorant(self, path, value, mode="overwrite", **options):
        if mode == "create":
            raise NotImplementedError
        return pipe_file(self, path, value, mode=mode, **options)

    monkeypatch.setattr(type(filesystem), "pipe_file", ignorant)
    storage = ObjectStorage(memory_url)
    assert storage.create("acme/x", b"1")
    assert not storage.create("acme/x", b"2")
    assert [publish(memory_url, NAME, write) for _ in range(2)] == [1, 2]


def test_a_full_model_is_published_to_an_object_store_too(object_url):
    def write_model(directory: Path) -> None:
        (directory / "config.json").write_bytes(b"{}")
        (directory / "model.safetensors").write_bytes(b"w")

    assert publish(object_url, NAME, write_model, required=("config.json", "model.safetensors")) == 1
    storage = open_storage(object_url)
    assert existing_versions(storage.files("acme/support")) == [], "it is no adapter"
    assert publish(object_url, NAME, write) == 2


def test_a_missing_bucket_is_an_error_and_not_an_empty_store(s3_server):
    with pytest.raises(StorageError, match="the store failed"):
        publish("s3://nobody-has-this/store", NAME, write)


def test_a_missing_package_is_named_with_its_extra():
    with pytest.raises(StoragePackageError, match=r"pip install 'hotswap\[gcs\]'"):
        publish("gs://bucket/store", NAME, write)
    with pytest.raises(StoragePackageError, match="no file system for this URL"):
        publish("nope://bucket/store", NAME, write)
