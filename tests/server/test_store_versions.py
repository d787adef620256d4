"""What a name means: versions, aliases and canaries, in a store of each kind, and what a look costs."""

import collections
import json
import os
import threading
import time
from pathlib import Path

import fsspec
import pytest
import torch
from hotswap.aliases import Target
from hotswap.layout import ALIASES_FILE, CLAIM_PREFIX, CONFIG_FILE, MANIFEST_FILE, WEIGHTS_FILE, publish
from hotswap.names import AdapterName
from hotswap.object_storage import ObjectStorage
from hotswap.storage import open_storage
from hotswap.store_admin import delete, roll_back, set_alias
from hotswap_server.adapters.store import AdapterStore, StoredAdapter
from hotswap_server.errors import (
    AdapterInvalidError,
    AdapterNotFoundError,
    InvalidRequestError,
    StoreUnavailableError,
)
from safetensors.torch import save
from support.object_stores import fill

NAME = AdapterName("acme", "support")
LIST = "list_objects_v2"
CONFIG = json.dumps({"peft_type": "LORA", "r": 4}).encode()


def weights(seed: int) -> bytes:
    return save({"t": torch.full((4,), float(seed))})


def publish_next(url: str, seed: int, name: AdapterName = NAME) -> int:
    def write(directory: Path) -> None:
        (directory / CONFIG_FILE).write_bytes(CONFIG)
        (directory / WEIGHTS_FILE).write_bytes(weights(seed))

    return publish(url, name, write)


def store_at(url: str, **options: float) -> AdapterStore:
    return AdapterStore(url, lambda config: "lora", **options)


@pytest.fixture
def stored(store_url):
    """A store of each kind with versions 1 to 3, whose tensors hold their number."""
    fill(store_url, str(NAME), {version: weights(version) for version in (1, 2, 3)}, CONFIG)
    return store_url


def value(store: AdapterStore, name: str, **options: str) -> float:
    ref = store.resolve(name, **options)
    return store.read(ref).tensors["t"][0].item()


def test_a_name_means_stable_or_else_the_latest_version(stored):
    store, storage = store_at(stored), open_storage(stored)
    assert value(store, "acme/support") == 3
    assert store.resolve("acme/support@latest").version == 3
    set_alias(storage, NAME, "stable", Target(1))
    assert value(store, "acme/support") == 1
    publish_next(stored, 4)
    assert store.resolve("acme/support").version == 1
    assert value(store, "acme/support@latest") == 4
    assert value(store, "acme/support@2") == 2
    set_alias(storage, NAME, "latest", Target(2))
    set_alias(storage, NAME, "stable", None)
    assert store.resolve("acme/support").version == 2
    roll_back(storage, NAME, "latest")
    assert store.resolve("acme/support").version == 4


def test_a_canary_gets_its_share_by_key(stored):
    store = store_at(stored, refresh_s=60.0)
    set_alias(open_storage(stored), NAME, "stable", Target(2, 3, 25))
    chosen = {str(i): store.resolve("acme/support", key=str(i)).version for i in range(60)}
    assert set(chosen.values()) == {2, 3}
    assert chosen == {key: store.resolve("acme/support@stable", key=key).version for key in chosen}
    assert store.resolve("acme/support").version == 2, "without a key it is never the canary"


def test_a_deleted_version_is_no_longer_found(stored):
    store = store_at(stored)
    old = store.resolve("acme/support")
    delete(open_storage(stored), NAME, 3, force=True)
    assert store.resolve("acme/support").version == 2
    with pytest.raises(AdapterNotFoundError, match="acme/support@3"):
        store.resolve("acme/support", 3)
    with pytest.raises(AdapterNotFoundError, match="acme/support@3"):
        store.read(old)
    assert list(store.list()) == [StoredAdapter("acme/support", (1, 2))]
    assert publish_next(stored, 5) == 4
    assert value(store, "acme/support") == 5


def test_an_alias_that_means_nothing_says_so(stored):
    store, storage = store_at(stored), open_storage(stored)
    with pytest.raises(AdapterNotFoundError, match="acme/support has no alias beta; it has latest"):
        store.resolve("acme/support@beta")
    with pytest.raises(AdapterNotFoundError, match="no adapter acme/other"):
        store.resolve("acme/other")
    set_alias(storage, NAME, "stable", Target(2))
    delete(storage, NAME, 2, force=True)
    with pytest.raises(AdapterNotFoundError, match="means version 2, which the store does not have"):
        store.resolve("acme/support")
    with pytest.raises(InvalidRequestError, match="version: must be absent"):
        store.resolve("acme/support@stable", 1)


@pytest.mark.parametrize("content", [b"not json", b'{"hotswap": 1, "aliases": {"../x": {"version": 1}}}'])
def test_a_damaged_alias_file_is_an_error_and_never_the_latest_version(stored, content):
    store = store_at(stored)
    open_storage(stored).replace(f"acme/support/{ALIASES_FILE}", content, None)
    with pytest.raises(AdapterInvalidError, match=f"acme/support: {ALIASES_FILE}"):
        store.resolve("acme/support")
    assert store.resolve("acme/support", 3).version == 3


def test_the_digest_is_that_of_the_content(stored):
    """The manifest's digest, that of the weights without a manifest, and the one that is read, are one."""
    store, storage = store_at(stored), open_storage(stored)
    by_manifest = store.resolve("acme/support", 2)
    if isinstance(storage, ObjectStorage):
        storage.remove(f"acme/support/2/{MANIFEST_FILE}")
    else:
        (Path(stored) / "acme/support/2" / MANIFEST_FILE).unlink()
    by_weights = store_at(stored).resolve("acme/support", 2)
    assert by_manifest == by_weights
    assert store.read(by_weights).ref == by_manifest


def test_an_alias_file_may_not_be_a_link_out_of_the_store(tmp_path):
    publish_next(str(tmp_path / "store"), 1)
    (tmp_path / "outside.json").write_text('{"hotswap": 1, "aliases": {"stable": {"version": 9}}}')
    (tmp_path / "store/acme/support" / ALIASES_FILE).symlink_to(tmp_path / "outside.json")
    with pytest.raises(AdapterInvalidError, match="leads out of the store"):
        store_at(str(tmp_path / "store")).resolve("acme/support")


def test_what_is_being_published_is_not_served(s3_url):
    publish_next(s3_url, 1)
    storage = ObjectStorage(s3_url)
    for path, content in (
        (f"{CLAIM_PREFIX}2", b"{}"),
        (f"2/{WEIGHTS_FILE}", weights(2)),
        (f"2/{CONFIG_FILE}", CONFIG),
    ):
        assert storage.create(f"acme/support/{path}", content)
        store = store_at(s3_url)
        assert store.resolve("acme/support").version == 1
        with pytest.raises(AdapterNotFoundError):
            store.resolve("acme/support", 2)
    storage.remove(f"acme/support/{CLAIM_PREFIX}2")  # as if both had been copied there by hand
    assert store.resolve("acme/support").version == 2


@pytest.fixture
def calls(monkeypatch, s3_server):
    """What is asked of S3: the operations by name, counted."""
    counted: collections.Counter[str] = collections.Counter()
    filesystem = type(fsspec.filesystem("s3"))
    call = filesystem._call_s3

    async def counting(self, method, *arguments, **options):
        counted[method] += 1
        return await call(self, method, *arguments, **options)

    monkeypatch.setattr(filesystem, "_call_s3", counting)
    return counted


def test_a_request_costs_at_most_one_listing_and_none_while_that_is_fresh(s3_url, calls):
    fill(s3_url, str(NAME), {version: weights(version) for version in (1, 2, 3)}, CONFIG)
    set_alias(open_storage(s3_url), NAME, "stable", Target(2, 3, 50))
    store = store_at(s3_url, refresh_s=60.0)
    calls.clear()
    assert store.resolve("acme/support").version == 2
    assert calls == {LIST: 1, "get_object": 3}, "a listing, the aliases, the manifest and the configuration"
    calls.clear()
    for key in "abcdefgh":
        store.resolve("acme/support", key=key)
    assert calls.keys() <= {"get_object"}
    assert calls["get_object"] <= 2, "the canary's manifest and configuration"
    calls.clear()
    for key in "abcdefgh":
        store.resolve("acme/support", key=key)
        store.resolve("acme/support", 2)
    assert not calls
    store.read(store.resolve("acme/support"))
    assert calls == {"get_object": 2}


def test_a_listing_is_looked_at_again_after_its_time(s3_url, calls):
    publish_next(s3_url, 1)
    store = store_at(s3_url, refresh_s=0.5)
    assert store.resolve("acme/support").version == 1
    publish_next(s3_url, 2)
    until = time.monotonic() + 30
    while store.resolve("acme/support").version == 1:
        assert time.monotonic() < until
        time.sleep(0.05)
    calls.clear()
    store.resolve("acme/support", 1)
    assert calls[LIST] <= 1


def test_those_who_ask_at_the_same_time_share_a_listing(s3_url, calls):
    publish_next(s3_url, 1)
    store, barrier = store_at(s3_url, refresh_s=60.0), threading.Barrier(6)
    calls.clear()

    def resolve() -> None:
        barrier.wait()
        store.resolve("acme/support")

    threads = [threading.Thread(target=resolve) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert calls == {LIST: 1, "get_object": 2}


def test_what_is_missing_is_remembered_for_as_long_as_a_listing(s3_url, calls):
    publish_next(s3_url, 1)
    store = store_at(s3_url, refresh_s=60.0)
    for first in (True, False, False):
        with pytest.raises(AdapterNotFoundError):
            store.resolve("acme/nobody")
        assert first or not calls
        calls.clear()


def test_the_list_reads_no_weights_and_asks_for_all_at_once(s3_url, calls):
    names = [AdapterName("acme", f"task-{i}") for i in range(6)]
    for name in names:
        fill(s3_url, str(name), {1: weights(1)}, CONFIG)
    ObjectStorage(s3_url).create(f"acme/dropped/{CONFIG_FILE}", CONFIG)
    ObjectStorage(s3_url).create(f"acme/dropped/{WEIGHTS_FILE}", weights(7))
    store = store_at(s3_url, refresh_s=60.0)
    calls.clear()
    found = store.list()
    assert calls == {LIST: 1}
    assert found == [StoredAdapter("acme/dropped", (1,)), *(StoredAdapter(str(name), (1,)) for name in names)]
    store.survey((adapter.name, 1) for adapter in found)
    assert calls == {LIST: 1, "get_object": 12}
    refs = {adapter.name: store.peek(adapter.name, 1) for adapter in found}
    assert calls == {LIST: 1, "get_object": 13}, "the configuration of the one without a manifest"
    assert refs["acme/dropped"].digest == ""
    assert {str(name): refs[str(name)] for name in names} == {
        str(name): store.resolve(str(name)) for name in names
    }
    assert calls == {LIST: 1, "get_object": 13}
    assert len(store.resolve("acme/dropped").digest) == 64
    assert refs["acme/dropped"].method == "lora"


def test_a_missing_bucket_is_unavailable(s3_server):
    store = store_at("s3://nobody-has-this/store")
    for call in (store.list, lambda: store.resolve("acme/support")):
        with pytest.raises(StoreUnavailableError, match="bucket is missing"):
            call()


def test_a_link_among_versions_is_followed_within_the_store(tmp_path):
    publish_next(str(tmp_path), 1)
    os.symlink("1", tmp_path / "acme/support/2")
    store = store_at(str(tmp_path))
    assert value(store, "acme/support") == 1
    assert store.resolve("acme/support").version == 2
