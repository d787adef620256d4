import json
import os
import threading
from pathlib import Path

import fsspec
import pytest
import torch
from fsspec.implementations.local import LocalFileSystem
from hotswap.layout import CONFIG_FILE, WEIGHTS_FILE, content_digest, publish
from hotswap.names import AdapterName
from hotswap_server.adapters.checkpoint import AdapterChangedError
from hotswap_server.adapters.store import MAX_CONFIG_BYTES, AdapterStore, StoredAdapter
from hotswap_server.core import AdapterRef
from hotswap_server.errors import (
    AdapterInvalidError,
    AdapterNotFoundError,
    InvalidRequestError,
    StoreDeniedError,
    StoreUnavailableError,
)
from safetensors.torch import save

NAME = AdapterName("acme", "support")


def files(seed: int = 0) -> dict[str, bytes]:
    config = json.dumps({"peft_type": "LORA", "r": 4}).encode()
    return {CONFIG_FILE: config, WEIGHTS_FILE: save({"t": torch.full((4,), float(seed))})}


def put(directory: Path, seed: int = 0, **changes: bytes | None) -> None:
    """A PEFT directory; `config=` and `weights=` replace a file's content, or leave it out."""
    directory.mkdir(parents=True, exist_ok=True)
    named = {{"config": CONFIG_FILE, "weights": WEIGHTS_FILE}[key]: value for key, value in changes.items()}
    for name, content in {**files(seed), **named}.items():
        if content is not None:
            (directory / name).write_bytes(content)


def method_of(config: dict[str, object]) -> str:
    if config.get("peft_type") != "LORA":
        raise AdapterInvalidError(f"peft_type {config.get('peft_type')!r} is not served")
    return "lora"


def store_at(path: Path | str, **options: int) -> AdapterStore:
    return AdapterStore(path, method_of, **options)


@pytest.fixture
def bytes_read(monkeypatch):
    """The sizes of all reads from local files, in order."""
    sizes: list[int] = []
    cat_file = LocalFileSystem.cat_file

    def counting(self, path, start=None, end=None, **options):
        content = cat_file(self, path, start=start, end=end, **options)
        sizes.append(len(content))
        return content

    monkeypatch.setattr(LocalFileSystem, "cat_file", counting)
    return sizes


def test_the_latest_version_is_the_highest_number(tmp_path):
    for version in (1, 2, 10):
        put(tmp_path / f"acme/support/{version}", seed=version)
    store = store_at(tmp_path)
    latest = store.resolve("acme/support")
    content = files(10)
    digest = content_digest(content[CONFIG_FILE], content[WEIGHTS_FILE])
    assert latest == AdapterRef("acme/support", 10, digest, "lora")
    assert store.resolve("acme/support", 2).version == 2
    assert store.resolve("acme/support", 1).digest != digest


def test_what_is_read_is_what_was_resolved(tmp_path):
    put(tmp_path / "acme/support/1", seed=3)
    store = store_at(tmp_path)
    ref = store.resolve("acme/support")
    raw = store.read(ref)
    assert raw.ref == ref
    assert raw.config["r"] == 4
    assert torch.equal(raw.tensors["t"], torch.full((4,), 3.0))


def test_a_dropped_directory_is_version_one(tmp_path):
    put(tmp_path / "acme/support")
    store = store_at(tmp_path)
    ref = store.resolve("acme/support")
    assert ref.version == 1
    assert ref == store.resolve("acme/support", 1)
    assert store.read(ref).ref == ref
    put(tmp_path / "acme/support/2", seed=2)
    assert store.resolve("acme/support").version == 2
    assert store.resolve("acme/support", 1) == ref


def test_a_numbered_directory_hides_the_dropped_one(tmp_path):
    put(tmp_path / "acme/support", seed=5)
    put(tmp_path / "acme/support/1", seed=6)
    store = store_at(tmp_path)
    ref = store.resolve("acme/support", 1)
    assert ref == store.resolve("acme/support")
    assert torch.equal(store.read(ref).tensors["t"], torch.full((4,), 6.0))


def test_published_versions_are_seen_without_restart(tmp_path):
    store = store_at(tmp_path)
    for version in (1, 2):
        publish(tmp_path, NAME, lambda directory, version=version: put(directory, seed=version))
        assert store.resolve("acme/support").version == version
        assert store.list() == [StoredAdapter("acme/support", tuple(range(1, version + 1)))]


@pytest.mark.parametrize("replace", ["in place", "by rename"])
def test_a_version_that_changes_gets_a_new_digest(tmp_path, replace):
    directory = tmp_path / "acme/support"
    put(directory, seed=1)
    store = store_at(tmp_path)
    before = store.resolve("acme/support")
    status = (directory / WEIGHTS_FILE).stat()
    content = files(2)[WEIGHTS_FILE]
    assert len(content) == status.st_size
    if replace == "in place":
        (directory / WEIGHTS_FILE).write_bytes(content)
        os.utime(directory / WEIGHTS_FILE, ns=(status.st_atime_ns, status.st_mtime_ns + 1_000_000))
    else:  # as rsync --times does: neither size nor time tell
        (tmp_path / "new").write_bytes(content)
        os.utime(tmp_path / "new", ns=(status.st_atime_ns, status.st_mtime_ns))
        (tmp_path / "new").rename(directory / WEIGHTS_FILE)
    after = store.resolve("acme/support")
    assert after.digest != before.digest
    with pytest.raises(AdapterChangedError, match="acme/support@1: its files changed"):
        store.read(before)
    assert torch.equal(store.read(after).tensors["t"], torch.full((4,), 2.0))


def test_a_digest_proved_wrong_is_not_remembered(tmp_path):
    put(tmp_path / "acme/support/1", seed=1)
    store = store_at(tmp_path)
    wrong = AdapterRef("acme/support", 1, "0" * 64, "lora")
    right = store.resolve("acme/support")
    (location,) = store._known
    store._known[location] = (store._known[location][0], wrong)  # as if a change had left no mark
    assert store.resolve("acme/support") == wrong
    with pytest.raises(AdapterChangedError):
        store.read(wrong)
    assert store.resolve("acme/support") == right


def test_an_unchanged_adapter_is_hashed_once(tmp_path, bytes_read):
    put(tmp_path / "acme/support/1")
    store = store_at(tmp_path)
    first = store.resolve("acme/support")
    assert len(bytes_read) == 2
    assert store.resolve("acme/support") == first
    assert store.resolve("acme/support", 1) == first
    assert len(bytes_read) == 2


def test_threads_that_want_the_same_adapter_hash_it_once(tmp_path, bytes_read):
    put(tmp_path / "acme/support/1")
    store, barrier = store_at(tmp_path), threading.Barrier(6)
    refs: list[AdapterRef] = []

    def resolve() -> None:
        barrier.wait()
        refs.append(store.resolve("acme/support"))

    threads = [threading.Thread(target=resolve) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(refs)) == 1
    assert len(refs) == 6
    assert len(bytes_read) == 2


def test_a_file_is_hashed_and_read_in_chunks(tmp_path, bytes_read, monkeypatch):
    monkeypatch.setattr("hotswap_server.adapters.files._CHUNK_BYTES", 16)
    put(tmp_path / "acme/support/1", seed=9)
    store = store_at(tmp_path)
    ref = store.resolve("acme/support")
    content = files(9)
    assert ref.digest == content_digest(content[CONFIG_FILE], content[WEIGHTS_FILE])
    assert max(bytes_read) == 16
    assert torch.equal(store.read(ref).tensors["t"], torch.full((4,), 9.0))


@pytest.mark.parametrize(
    ("name", "version", "label"),
    [
        ("acme/other", None, "acme/other"),
        ("nobody/support", None, "nobody/support"),
        ("acme/support", 2, "acme/support@2"),
        ("acme/support", 9, "acme/support@9"),
        ("acme/other", 1, "acme/other@1"),
        ("acme/empty", None, "acme/empty"),
        ("acme/file", None, "acme/file"),
        ("acme/file", 3, "acme/file@3"),
        ("file/support", None, "file/support"),
    ],
)
def test_a_missing_adapter_is_not_found(tmp_path, name, version, label):
    put(tmp_path / "acme/support/1")
    (tmp_path / "acme/empty").mkdir()
    (tmp_path / "acme/file").touch()
    (tmp_path / "file").touch()
    (tmp_path / "acme/support/2").touch()
    with pytest.raises(AdapterNotFoundError) as caught:
        store_at(tmp_path).resolve(name, version)
    assert str(caught.value) == f"the store has no adapter {label}"


def test_a_version_that_goes_away_is_not_found(tmp_path):
    put(tmp_path / "acme/support/1")
    store = store_at(tmp_path)
    ref = store.resolve("acme/support")
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        (tmp_path / "acme/support/1" / file).unlink()
    with pytest.raises(AdapterNotFoundError, match="acme/support@1"):
        store.read(ref)


@pytest.mark.parametrize(
    "name", ["../support", "acme/..", "/etc/passwd", "acme", "acme/a/b", "acme/x\x00", ""]
)
def test_a_name_that_is_a_path_is_refused(tmp_path, name):
    with pytest.raises(InvalidRequestError) as caught:
        store_at(tmp_path).resolve(name)
    assert caught.value.field == "adapter"


@pytest.mark.parametrize("version", [0, -1, 2**31])
def test_a_version_out_of_range_is_refused(tmp_path, version):
    with pytest.raises(InvalidRequestError) as caught:
        store_at(tmp_path).resolve("acme/support", version)
    assert caught.value.field == "version"


def test_an_upload_in_progress_is_not_the_latest_version(tmp_path):
    put(tmp_path / "acme/support/1")
    put(tmp_path / "acme/support/2", weights=None)
    put(tmp_path / "acme/support/.publish-x", seed=2)
    store = store_at(tmp_path)
    assert store.resolve("acme/support").version == 1
    assert store.list() == [StoredAdapter("acme/support", (1,))]
    with pytest.raises(AdapterInvalidError, match=f"acme/support@2: {WEIGHTS_FILE} is missing"):
        store.resolve("acme/support", 2)


@pytest.mark.parametrize("missing", ["config", "weights"])
@pytest.mark.parametrize("directory", ["acme/support", "acme/support/1"])
def test_an_adapter_without_one_of_its_files_names_it(tmp_path, missing, directory):
    put(tmp_path / directory, **{missing: None})
    with pytest.raises(AdapterInvalidError, match=r"acme/support@1: adapter_\w+\.\w+ is missing"):
        store_at(tmp_path).resolve("acme/support")


def test_a_pickle_alone_is_refused_with_the_remedy(tmp_path):
    put(tmp_path / "acme/support/1")
    put(tmp_path / "acme/support/2", weights=None)
    (tmp_path / "acme/support/2/adapter_model.bin").write_bytes(b"\x80\x02}.")
    store = store_at(tmp_path)
    with pytest.raises(AdapterInvalidError, match=r"@2: adapter_model.bin .* convert it to safetensors"):
        store.resolve("acme/support")
    assert store.resolve("acme/support", 1).version == 1


def test_a_method_nobody_serves_is_refused_before_the_weights_are_read(tmp_path, bytes_read):
    put(tmp_path / "acme/support/1", config=b'{"peft_type": "VERA"}')
    with pytest.raises(AdapterInvalidError, match="'VERA' is not served"):
        store_at(tmp_path).resolve("acme/support")
    assert len(bytes_read) == 1


def test_a_file_over_its_limit_is_not_read(tmp_path, bytes_read):
    put(tmp_path / "acme/big-config/1", config=b" " * (MAX_CONFIG_BYTES + 1))
    put(tmp_path / "acme/big-weights/1", weights=b"w" * 101)
    store = store_at(tmp_path, max_weights_bytes=100)
    with pytest.raises(
        AdapterInvalidError, match=f"{CONFIG_FILE} has 1048577 bytes, over the limit of 1048576"
    ):
        store.resolve("acme/big-config")
    with pytest.raises(AdapterInvalidError, match=f"{WEIGHTS_FILE} has 101 bytes, over the limit of 100"):
        store.resolve("acme/big-weights")
    assert max(bytes_read) < 100


def test_what_is_no_regular_file_is_not_opened(tmp_path):
    put(tmp_path / "acme/fifo/1", weights=None)
    os.mkfifo(tmp_path / "acme/fifo/1" / WEIGHTS_FILE)
    put(tmp_path / "acme/directory/1", config=None)
    (tmp_path / "acme/directory/1" / CONFIG_FILE).mkdir()
    put(tmp_path / "acme/empty/1", config=b"")
    for name in ("acme/fifo", "acme/directory", "acme/empty"):
        with pytest.raises(AdapterInvalidError, match="must be a regular file with content"):
            store_at(tmp_path).resolve(name)


@pytest.mark.parametrize("link", ["acme", "acme/support", "acme/support/1", f"acme/support/1/{WEIGHTS_FILE}"])
def test_a_link_out_of_the_store_is_refused(tmp_path, link):
    outside, root = tmp_path / "outside", tmp_path / "store"
    put(outside / "acme/support/1")
    put(root / "zeta/fine/1")
    put(root / "acme/support/1")
    path = root / link
    path.rename(tmp_path / "moved")
    path.symlink_to(outside / link)
    store = store_at(root)
    with pytest.raises(AdapterInvalidError, match="leads out of the store") as caught:
        store.resolve("acme/support", 1)
    assert str(tmp_path) not in str(caught.value)
    assert StoredAdapter("zeta/fine", (1,)) in store.list()


def test_a_link_swapped_in_after_resolving_is_refused(tmp_path):
    root = tmp_path / "store"
    put(root / "acme/support/1")
    put(tmp_path / "outside")
    store = store_at(root)
    ref = store.resolve("acme/support")
    (root / "acme/support/1" / WEIGHTS_FILE).unlink()
    (root / "acme/support/1" / WEIGHTS_FILE).symlink_to(tmp_path / "outside" / WEIGHTS_FILE)
    with pytest.raises(AdapterInvalidError, match="leads out of the store"):
        store.read(ref)
    with pytest.raises(AdapterInvalidError, match="leads out of the store"):
        store.resolve("acme/support")


def test_links_within_the_store_and_to_it_are_followed(tmp_path):
    put(tmp_path / "real/acme/support/1", seed=1)
    (tmp_path / "real/acme/support/4").symlink_to("1")
    (tmp_path / "real/acme/support/5").symlink_to("nothing")
    (tmp_path / "link").symlink_to("real")
    store = store_at(tmp_path / "link")
    assert store.resolve("acme/support").version == 4
    assert store.resolve("acme/support").digest == store.resolve("acme/support", 1).digest
    assert store.list() == [StoredAdapter("acme/support", (1, 4))]


def test_damaged_entries_do_not_break_the_list(tmp_path):
    put(tmp_path / "acme/support/1")
    put(tmp_path / "acme/support/2", config=b"not json")
    put(tmp_path / "acme/dropped")
    put(tmp_path / "acme/bad name/1")
    put(tmp_path / "acme/support/01")
    put(tmp_path / "acme/support/latest")
    put(tmp_path / "acme/support/1/2")
    put(tmp_path / ".hidden/support/1")
    put(tmp_path / "tenant-is-adapter")
    (tmp_path / "zeta").touch()
    (tmp_path / "loop").mkdir()
    (tmp_path / "loop/loop").symlink_to(".")
    (tmp_path / "broken").symlink_to("nothing")
    assert store_at(tmp_path).list() == [
        StoredAdapter("acme/dropped", (1,)),
        StoredAdapter("acme/support", (1, 2)),
    ]


def test_a_missing_store_is_unavailable_and_its_path_is_not_told(tmp_path):
    store = store_at(tmp_path / "gone")
    for call in (store.list, lambda: store.resolve("acme/support"), lambda: store.resolve("acme/support", 2)):
        with pytest.raises(StoreUnavailableError) as caught:
            call()
        assert str(tmp_path) not in str(caught.value)
    put(tmp_path / "gone/acme/support/2")
    assert store.resolve("acme/support").version == 2


@pytest.mark.parametrize("failing", ["ls", "cat_file"])
@pytest.mark.parametrize("error", [PermissionError("/secret/path"), RuntimeError("s3 key=secret")])
def test_errors_of_the_storage_are_typed_and_tell_no_secret(tmp_path, monkeypatch, failing, error):
    put(tmp_path / "acme/support/1")
    store = store_at(tmp_path)

    def fail(*args, **options):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(LocalFileSystem, failing, fail)
        with pytest.raises(StoreUnavailableError, match=type(error).__name__) as caught:
            store.resolve("acme/support")
    assert "secret" not in str(caught.value)
    denied = isinstance(error, PermissionError)
    assert (isinstance(caught.value, StoreDeniedError), caught.value.transient) == (denied, not denied)
    assert store.resolve("acme/support").version == 1, "nothing of the failure is remembered"


def test_an_adapter_that_keeps_changing_is_unavailable(tmp_path, monkeypatch):
    directory = tmp_path / "acme/support/1"
    put(directory)
    cat_file = LocalFileSystem.cat_file

    def cat_and_touch(self, path, **options):
        content = cat_file(self, path, **options)
        put(directory)
        os.utime(directory / CONFIG_FILE, (0, next(times)))
        return content

    times = iter(range(100))
    monkeypatch.setattr(LocalFileSystem, "cat_file", cat_and_touch)
    with pytest.raises(StoreUnavailableError, match="acme/support@1 keeps changing"):
        store_at(tmp_path).resolve("acme/support")


def upload(url: str, seed: int) -> None:
    fs, root = fsspec.core.url_to_fs(url)
    fs.pipe({f"{root}/{name}": content for name, content in files(seed).items()})


def test_an_object_store_works_alike(memory_url):
    upload(f"{memory_url}/acme/support/1", seed=1)
    upload(f"{memory_url}/acme/dropped", seed=2)
    store = store_at(memory_url)
    first = store.resolve("acme/support")
    assert torch.equal(store.read(first).tensors["t"], torch.full((4,), 1.0))
    assert store.resolve("acme/dropped").version == 1
    upload(f"{memory_url}/acme/support/3", seed=3)
    assert store.resolve("acme/support").version == 3
    assert store.list() == [StoredAdapter("acme/dropped", (1,)), StoredAdapter("acme/support", (1, 3))]
    upload(f"{memory_url}/acme/support/1", seed=4)
    assert store.resolve("acme/support", 1).digest != first.digest
    with pytest.raises(AdapterNotFoundError):
        store.resolve("acme/other")


def test_an_empty_object_store_lists_nothing(memory_url):
    assert list(store_at(memory_url).list()) == []
    upload(f"{memory_url}/acme/support/1", seed=1)  # for the fixture to remove


def test_a_file_url_is_a_directory(tmp_path):
    put(tmp_path / "acme/support/1")
    assert store_at(f"file://{tmp_path}").resolve("acme/support") == store_at(tmp_path).resolve(
        "acme/support"
    )


def test_a_url_that_nothing_reads_is_refused():
    with pytest.raises(InvalidRequestError, match="store: no file system for this URL"):
        store_at("nope://bucket/store")
