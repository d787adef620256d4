"""Storage that fails in every way a loader meets: typed errors, no half-loaded adapter, nothing left over.

The faults are put where fsspec's file systems are called, so that all that is ours runs.
"""

import gc
import json
import os
import threading
from pathlib import Path

import fsspec
import pytest
import torch
from hotswap.layout import CONFIG_FILE, MANIFEST_FILE, WEIGHTS_FILE, publish
from hotswap.names import AdapterName
from hotswap.object_storage import ObjectStorage
from hotswap.storage import open_filesystem, open_storage
from hotswap.store_admin import delete
from hotswap_server.adapters.checkpoint import AdapterChangedError, RawCheckpoint
from hotswap_server.adapters.host_cache import HostCache
from hotswap_server.adapters.loader import Loader
from hotswap_server.adapters.store import AdapterStore
from hotswap_server.errors import (
    AdapterDamagedError,
    AdapterInvalidError,
    AdapterNotFoundError,
    StoreDeniedError,
    StoreUnavailableError,
)
from safetensors.torch import save
from support.object_stores import fill

NAME = AdapterName("acme", "support")
CONFIG = json.dumps({"peft_type": "LORA", "r": 4}).encode()
WEIGHTS = save({"t": torch.arange(4096, dtype=torch.float32)})
SOON_S = 60.0


class Adapter:
    """What a loader keeps; alive as long as somebody holds it."""

    method = "lora"
    alive = 0

    def __init__(self, raw: RawCheckpoint) -> None:
        self.nbytes = raw.nbytes
        self.tensors = raw.tensors
        Adapter.alive += 1

    def __del__(self) -> None:
        Adapter.alive -= 1


def write(directory: Path) -> None:
    (directory / CONFIG_FILE).write_bytes(CONFIG)
    (directory / WEIGHTS_FILE).write_bytes(WEIGHTS)


class Site:
    """A store of one kind with one version, its bytes within reach, and a loader that reads it."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.filesystem, self.root = open_filesystem(url)
        self.store = AdapterStore(url, lambda config: "lora", refresh_s=60.0)
        self.cache: HostCache[Adapter] = HostCache(1 << 20)
        self.loader: Loader[Adapter] = Loader(
            self.store, self.cache, Adapter, workers=1, retries=2, backoff_s=0.01, deadline_s=SOON_S
        )

    def path(self, file: str) -> str:
        return f"{self.root}/acme/support/1/{file}"

    def put(self, file: str, content: bytes) -> None:
        if "://" in self.url:
            self.filesystem.pipe_file(self.path(file), content)
        else:
            Path(self.path(file)).write_bytes(content)

    def remove(self, file: str) -> None:
        self.filesystem.rm_file(self.path(file))

    def load(self) -> Adapter:
        return self.loader.load(self.store.resolve("acme/support")).result(SOON_S)

    def content_again(self) -> None:
        for file, content in ((CONFIG_FILE, CONFIG), (WEIGHTS_FILE, WEIGHTS)):
            self.put(file, content)


@pytest.fixture(scope="module", autouse=True)
def _collect_what_is_new():
    """Going through all of torch's objects after each test would take longer than the tests."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def site(store_url, tmp_path, monkeypatch):
    """After the test nothing may be left: no thread, no temporary or open file, no adapter in memory."""
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    fill(store_url, str(NAME), {1: WEIGHTS}, CONFIG)
    AdapterStore(store_url, lambda config: "lora").resolve("acme/support")  # starts fsspec's own thread
    threads, files = set(threading.enumerate()), open_files(store_url)
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    site = Site(store_url)
    yield site
    site.loader.close()
    assert list(temporary.iterdir()) == []
    left = [thread.name for thread in set(threading.enumerate()) - threads if "Thread-" not in thread.name]
    assert left == [], "beside the threads of the server of S3"
    assert open_files(store_url) <= files
    del site.cache, site.loader
    gc.collect()
    assert Adapter.alive == 0


def open_files(url: str) -> set[str]:
    found = set()
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            path = os.readlink(f"/proc/self/fd/{descriptor}")
        except OSError:
            continue
        if "acme" in path or path.startswith(url):
            found.add(path)
    return found


def fails_to_load(site, kind, match, transient=False):
    """Loading fails in the way that is meant, and leaves nothing behind."""
    with pytest.raises(kind, match=match) as caught:
        site.load()
    assert caught.value.transient is transient
    assert "test" not in str(caught.value), "no credentials"
    assert site.root.strip("/").partition("/")[0] not in str(caught.value), "no path outside the store"
    assert site.cache.stats.entries == 0
    del caught
    gc.collect()
    assert Adapter.alive == 0


@pytest.mark.parametrize("file", [CONFIG_FILE, WEIGHTS_FILE])
def test_a_missing_object(site, file):
    ref = site.store.resolve("acme/support")
    site.remove(file)
    with pytest.raises((AdapterNotFoundError, AdapterInvalidError), match=r"just left|is missing"):
        site.loader.load(ref).result(SOON_S)
    fails_to_load(site, (AdapterInvalidError, AdapterNotFoundError), f"{file} is missing|no adapter")
    site.content_again()
    site.loader.forget_failure(ref.digest)
    site.store._listings.forget(NAME)
    assert site.load().nbytes == 4 * 4096


@pytest.mark.parametrize("seen_before", [True, False])
@pytest.mark.parametrize("content", [WEIGHTS[:-100], b""], ids=["truncated", "empty"])
def test_a_file_that_was_cut(site, content, seen_before):
    ref = site.store.resolve("acme/support") if seen_before else None
    site.put(WEIGHTS_FILE, content)
    if ref is not None:  # an object store's listing is from before
        with pytest.raises((AdapterInvalidError, StoreUnavailableError)):
            site.loader.load(ref).result(SOON_S)
        site.loader.forget_failure(ref.digest)
    site.store._listings.forget(NAME)
    fails_to_load(site, AdapterInvalidError, WEIGHTS_FILE)


@pytest.mark.parametrize("file", [CONFIG_FILE, WEIGHTS_FILE])
def test_content_that_is_not_what_was_published(site, file):
    content = bytearray({CONFIG_FILE: CONFIG, WEIGHTS_FILE: WEIGHTS}[file])
    content[-2] ^= 1
    site.put(file, bytes(content))
    fails_to_load(site, AdapterDamagedError, f"{file} is not the content that was published")
    site.content_again()
    site.store._listings.forget(NAME)
    ref = site.store.resolve("acme/support")
    site.loader.forget_failure(ref.digest)
    assert torch.equal(site.load().tensors["t"], torch.arange(4096, dtype=torch.float32))


def test_a_manifest_that_was_changed_too_is_another_adapter(site):
    ref = site.store.resolve("acme/support")
    other = save({"t": torch.zeros(4096)})
    site.put(WEIGHTS_FILE, other)
    site.remove(MANIFEST_FILE)
    with pytest.raises(AdapterChangedError, match="its files changed"):
        site.loader.load(ref).result(SOON_S)
    now = site.store.resolve("acme/support")
    assert now.digest != ref.digest
    assert site.loader.load(now).result(SOON_S).tensors["t"].sum() == 0


@pytest.mark.parametrize(
    "manifest", [b"", b"not json", b"x" * ((1 << 20) + 1)], ids=["empty", "broken", "huge"]
)
def test_a_damaged_manifest(site, manifest):
    site.put(MANIFEST_FILE, manifest)
    fails_to_load(site, AdapterInvalidError, f"acme/support@1: {MANIFEST_FILE}")


def break_reads(site, monkeypatch, fault):
    """Let `fault(read)` stand for each read of the weights, where `read()` is what it would have been."""
    # Blocking methods of s3fs belong to the instance, those of the others to the class.
    own = "cat_file" in vars(site.filesystem)
    cat_file = site.filesystem.cat_file

    def faulty(path, **options):
        def read():
            return cat_file(path, **options)

        return fault(read) if path.endswith(WEIGHTS_FILE) else read()

    if own:
        monkeypatch.setattr(site.filesystem, "cat_file", faulty)
    else:
        monkeypatch.setattr(
            type(site.filesystem), "cat_file", lambda self, path, **options: faulty(path, **options)
        )


@pytest.mark.parametrize(
    ("error", "kind", "transient"),
    [
        (PermissionError("key=test"), StoreDeniedError, False),
        (ConnectionResetError("test"), StoreUnavailableError, True),
        (TimeoutError("test"), StoreUnavailableError, True),
        (RuntimeError("test"), StoreUnavailableError, True),
        (FileNotFoundError("test"), AdapterNotFoundError, False),
    ],
    ids=lambda value: getattr(type(value), "__name__", ""),
)
def test_a_read_that_fails_is_retried_if_it_may_pass(site, monkeypatch, error, kind, transient):
    tries = []

    def fail(read):
        tries.append(read)
        raise error

    break_reads(site, monkeypatch, fail)
    fails_to_load(site, kind, "acme/support@1", transient)
    assert len(tries) == (3 if transient else 1)


def test_a_read_that_ends_early_is_retried_and_then_whole(site, monkeypatch):
    reads = []

    def short_at_first(read):
        reads.append(read)
        return read()[: None if len(reads) > 1 else 1000]

    break_reads(site, monkeypatch, short_at_first)
    assert site.load().nbytes == 4 * 4096
    assert len(reads) == 2


def test_a_version_that_goes_in_mid_read(site, monkeypatch):
    monkeypatch.setattr("hotswap_server.adapters.files._CHUNK_BYTES", 4096)
    reads = []

    def delete_after_the_first(read):
        reads.append(read)
        if len(reads) == 2:
            delete(open_storage(site.url), NAME, 1, force=True)
        return read()

    break_reads(site, monkeypatch, delete_after_the_first)
    fails_to_load(site, AdapterNotFoundError, "acme/support@1")
    with pytest.raises(AdapterNotFoundError):
        site.store.resolve("acme/support")


def test_a_slow_read_lets_others_go_on(site, monkeypatch):
    publish(site.url, AdapterName("acme", "quick"), write)
    blocked, go = threading.Event(), threading.Event()

    def slow(read):
        blocked.set()
        assert go.wait(SOON_S)
        return read()

    break_reads(site, monkeypatch, slow)
    ref = site.store.resolve("acme/support")
    loading = site.loader.load(ref)
    assert blocked.wait(SOON_S)
    assert site.store.resolve("acme/quick").version == 1
    assert not loading.done()
    go.set()
    assert loading.result(SOON_S).nbytes == 4 * 4096


def test_s3_with_another_content(s3_url):
    fill(s3_url, str(NAME), {1: WEIGHTS}, CONFIG)
    store = AdapterStore(s3_url, lambda config: "lora", refresh_s=60.0)
    ref = store.resolve("acme/support")
    filesystem, root = open_filesystem(s3_url)
    filesystem.pipe_file(f"{root}/acme/support/1/{WEIGHTS_FILE}", WEIGHTS[:-1] + b"x")
    with pytest.raises(AdapterDamagedError, match="SHA-256 differs"):
        store.read(ref)
    filesystem.rm_file(f"{root}/acme/support/1/{WEIGHTS_FILE}")
    with pytest.raises(AdapterInvalidError, match=f"{WEIGHTS_FILE} is missing"):
        store.read(ref)
    delete(open_storage(s3_url), NAME, 1, force=True)
    with pytest.raises(AdapterNotFoundError):
        store.read(ref)


def test_s3_that_refuses_the_credentials(s3_url, monkeypatch):
    """The server's own errors, as they come through s3fs."""
    publish(s3_url, NAME, write)
    filesystem = type(fsspec.filesystem("s3"))
    from botocore.exceptions import ClientError, NoCredentialsError
    from s3fs.errors import translate_boto_error

    for error, kind in (
        (ClientError({"Error": {"Code": "AccessDenied", "Message": "no"}}, "GetObject"), StoreDeniedError),
        (NoCredentialsError(), StoreDeniedError),
    ):

        async def refuse(*arguments, error=error, **options):
            raise translate_boto_error(error)

        with monkeypatch.context() as patch:
            patch.setattr(filesystem, "_call_s3", refuse)
            with pytest.raises(kind):
                AdapterStore(s3_url, lambda config: "lora").resolve("acme/support")
    assert AdapterStore(s3_url, lambda config: "lora").resolve("acme/support").version == 1


def test_s3_that_is_not_there(s3_server, monkeypatch):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr("s3fs.core.S3FileSystem.retries", 1)
    fsspec.config.conf["s3"] = {"endpoint_url": "http://127.0.0.1:9"}  # discard: nothing listens
    try:
        with pytest.raises(StoreUnavailableError) as caught:
            AdapterStore("s3://stores/x", lambda config: "lora").resolve("acme/support")
        assert caught.value.transient
    finally:
        del fsspec.config.conf["s3"]
    assert isinstance(open_storage("s3://stores/x"), ObjectStorage)
