"""Aliases and deletions, alike in a directory, in memory and on S3."""

import os
import threading
from pathlib import Path

import pytest
from hotswap.aliases import LATEST, STABLE, Target
from hotswap.directory_storage import DirectoryStorage
from hotswap.layout import ALIASES_FILE, CLAIM_PREFIX, CONFIG_FILE, WEIGHTS_FILE, existing_versions, publish
from hotswap.names import AdapterName
from hotswap.object_storage import ObjectStorage
from hotswap.storage import StorageDeniedError, StorageError, open_storage
from hotswap.store_admin import (
    StoreChangeError,
    adapters,
    default_version,
    delete,
    read_aliases,
    roll_back,
    set_alias,
    versions,
)
from support.object_stores import fill

NAME = AdapterName("acme", "support")


def write(directory: Path) -> None:
    (directory / CONFIG_FILE).write_bytes(b"{}")
    (directory / WEIGHTS_FILE).write_bytes(b"w" * 1000)


@pytest.fixture
def storage(store_url):
    """A store with versions 1 to 4 of one adapter."""
    fill(store_url, str(NAME), dict.fromkeys(range(1, 5), b"w" * 1000))
    return open_storage(store_url)


def test_an_alias_is_set_moved_and_removed(storage):
    assert read_aliases(storage, NAME).targets == {}
    assert set_alias(storage, NAME, STABLE, Target(3)).before is None
    change = set_alias(storage, NAME, STABLE, Target(3, 4, 5))
    assert (change.before, change.after) == (Target(3), Target(3, 4, 5))
    set_alias(storage, NAME, "beta", Target(4))
    assert read_aliases(storage, NAME).targets == {STABLE: Target(3, 4, 5), "beta": Target(4)}
    assert set_alias(storage, NAME, "beta", None).after is None
    assert set(read_aliases(storage, NAME).targets) == {STABLE}
    assert versions(storage, NAME) == [1, 2, 3, 4]


def test_what_makes_no_sense_changes_nothing(storage):
    set_alias(storage, NAME, STABLE, Target(3))
    before = storage.files("")
    for call, problem in (
        (lambda: set_alias(storage, NAME, STABLE, Target(9)), "no version 9; it has 1, 2, 3, 4"),
        (lambda: set_alias(storage, NAME, STABLE, Target(3, 7, 5)), "no version 7"),
        (lambda: set_alias(storage, NAME, "beta", None), "no alias beta; it has stable"),
        (lambda: set_alias(storage, AdapterName("acme", "none"), STABLE, Target(1)), "no adapter acme/none"),
        (lambda: roll_back(storage, NAME, "beta"), "beta has no earlier version"),
        (lambda: delete(storage, NAME, 9), "no version 9"),
        (lambda: delete(storage, NAME, 3), "what requests get by stable"),
    ):
        with pytest.raises(StoreChangeError, match=problem):
            call()
    assert storage.files("") == before


def test_a_rollback_goes_back_one_change_at_a_time(storage):
    set_alias(storage, NAME, STABLE, Target(2))
    set_alias(storage, NAME, STABLE, Target(3))
    set_alias(storage, NAME, STABLE, Target(3, 4, 25))
    assert roll_back(storage, NAME).after == Target(3)
    assert roll_back(storage, NAME, STABLE).after == Target(2)
    assert roll_back(storage, NAME).after is None
    assert default_version(storage, NAME) == (Target(4), LATEST)


def test_a_rollback_without_aliases_pins_the_version_before(storage):
    change = roll_back(storage, NAME)
    assert (change.alias, change.before, change.after) == (LATEST, None, Target(3))
    publish(storage.url, NAME, write)
    assert default_version(storage, NAME) == (Target(3), LATEST)
    set_alias(storage, NAME, LATEST, None)
    assert default_version(storage, NAME) == (Target(5), LATEST)


def test_a_rollback_to_a_deleted_version_is_refused(storage):
    set_alias(storage, NAME, STABLE, Target(2))
    set_alias(storage, NAME, STABLE, Target(3))
    delete(storage, NAME, 2)
    with pytest.raises(StoreChangeError, match="no version 2; it has 1, 3, 4"):
        roll_back(storage, NAME)


def test_a_deleted_version_is_gone_and_its_number_is_not_used_again(storage):
    set_alias(storage, NAME, STABLE, Target(1))
    assert delete(storage, NAME, 4).dangling == ()
    assert versions(storage, NAME) == [1, 2, 3]
    assert not [path for path in storage.files("acme/support") if path.startswith("4/")]
    assert publish(storage.url, NAME, write) == 5
    with pytest.raises(StoreChangeError, match="no version 4"):
        delete(storage, NAME, 4)


@pytest.mark.parametrize("alias", [LATEST, STABLE, "beta", "canary"])
def test_what_an_alias_points_at_is_deleted_by_force_alone(storage, alias):
    if alias == "canary":
        set_alias(storage, NAME, STABLE, Target(3, 4, 5))
    elif alias != LATEST:
        set_alias(storage, NAME, alias, Target(4))
    with pytest.raises(StoreChangeError, match="force"):
        delete(storage, NAME, 4)
    dangling = delete(storage, NAME, 4, force=True).dangling
    assert dangling == {LATEST: (), "canary": (STABLE,)}.get(alias, (alias,))
    assert versions(storage, NAME) == [1, 2, 3]


def test_no_half_deleted_version_is_ever_seen(storage, monkeypatch):
    """After each step of a deletion the version is whole, or it is none."""
    set_alias(storage, NAME, STABLE, Target(1))
    seen, whole = [], {f"2/{CONFIG_FILE}", f"2/{WEIGHTS_FILE}"}

    def look() -> None:
        files = storage.files("acme/support")
        if 2 in existing_versions(files):
            assert whole <= files.keys()
        seen.append(2 in existing_versions(files))

    if isinstance(storage, ObjectStorage):
        remove = ObjectStorage.remove
        monkeypatch.setattr(ObjectStorage, "remove", lambda self, path: (look(), remove(self, path))[1])
    else:
        unlink = Path.unlink
        monkeypatch.setattr(Path, "unlink", lambda self, **options: (look(), unlink(self, **options))[1])
    delete(storage, NAME, 2)
    assert seen
    assert not any(seen), "it was gone before the first of its files was"


def test_an_interrupted_deletion_is_finished_by_giving_it_again(storage, monkeypatch):
    set_alias(storage, NAME, STABLE, Target(1))
    kind, method = (ObjectStorage, "remove") if isinstance(storage, ObjectStorage) else (Path, "unlink")

    def die(*arguments, **options):
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(kind, method, die)
        with pytest.raises(SystemExit):
            delete(storage, NAME, 2)
    assert versions(storage, NAME) == [1, 3, 4]
    assert any(path.endswith(WEIGHTS_FILE) and "2/" in path for path in storage.files("acme/support"))
    delete(storage, NAME, 2)
    assert not [path for path in storage.files("acme/support") if path.startswith(("2/", ".deleted-2/"))]


def test_what_is_left_of_a_version_is_deleted_too(storage):
    path = f"{NAME}/4/{WEIGHTS_FILE}"
    if isinstance(storage, ObjectStorage):
        storage.remove(path)
    else:
        (storage.root / path).unlink()
    assert versions(storage, NAME) == [1, 2, 3]
    delete(storage, NAME, 4)
    assert not [path for path in storage.files("acme/support") if path.startswith("4/")]
    assert publish(storage.url, NAME, write) == 5


def test_what_is_being_published_is_deleted_by_force_alone(memory_url):
    fill(memory_url, str(NAME), {1: b"w"})
    storage = ObjectStorage(memory_url)
    storage.create(f"{NAME}/{CLAIM_PREFIX}2", b"{}")
    storage.create(f"{NAME}/2/{WEIGHTS_FILE}", b"w")
    with pytest.raises(StoreChangeError, match="is being published"):
        delete(storage, NAME, 2)
    delete(storage, NAME, 2, force=True)
    assert publish(memory_url, NAME, write) == 3


def test_a_dropped_directory_is_deleted(store_url, tmp_path):
    storage = open_storage(store_url)
    if isinstance(storage, ObjectStorage):
        for file in (CONFIG_FILE, WEIGHTS_FILE):
            storage.create(f"acme/support/{file}", b"dropped")
    else:
        (Path(store_url) / "acme/support").mkdir(parents=True)
        write(Path(store_url) / "acme/support")
    publish(store_url, NAME, write)
    assert versions(storage, NAME) == [1, 2]
    delete(storage, NAME, 1)
    assert versions(storage, NAME) == [2]
    assert publish(store_url, NAME, write) == 3


def test_adapters_are_listed(storage):
    delete(storage, NAME, 2)
    assert adapters(storage) == {NAME: [1, 3, 4]}
    publish(storage.url, AdapterName("zeta", "x"), write)
    assert adapters(storage) == {NAME: [1, 3, 4], AdapterName("zeta", "x"): [1]}


@pytest.mark.parametrize("kind", ["tmp_path", "s3_url"])
def test_changes_at_the_same_time_are_all_kept(request, kind):
    url = str(request.getfixturevalue(kind))
    fill(url, str(NAME), dict.fromkeys(range(1, 5), b"w"))
    storage = open_storage(url)
    threads = [
        threading.Thread(target=set_alias, args=(storage, NAME, f"a{i}", Target(i % 4 + 1))) for i in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert read_aliases(storage, NAME).targets == {f"a{i}": Target(i % 4 + 1) for i in range(4)}


def test_a_damaged_alias_file_is_said_to_be(store_url):
    publish(store_url, NAME, write)
    storage = open_storage(store_url)
    storage.replace(f"{NAME}/{ALIASES_FILE}", b"not json", None)
    with pytest.raises(StoreChangeError, match=f"{ALIASES_FILE} is no JSON object"):
        set_alias(storage, NAME, STABLE, Target(1))


def test_links_lead_nowhere_outside(tmp_path):
    store, outside = tmp_path / "store", tmp_path / "outside"
    publish(outside, NAME, write)
    store.mkdir()
    (store / "acme").symlink_to(outside / "acme")
    storage = DirectoryStorage(store)
    for call in (
        lambda: versions(storage, NAME),
        lambda: set_alias(storage, NAME, STABLE, Target(1)),
        lambda: delete(storage, NAME, 1, force=True),
    ):
        with pytest.raises(StorageError, match="leads out of the store"):
            call()
    assert sorted(os.listdir(outside / "acme/support")) == ["1"]
    assert adapters(storage) == {}


def test_a_linked_version_is_unlinked_and_its_target_stays(tmp_path):
    publish(tmp_path, NAME, write)
    (tmp_path / "acme/support/5").symlink_to("1")
    storage = open_storage(tmp_path)
    assert versions(storage, NAME) == [1, 5]
    delete(storage, NAME, 5, force=True)
    assert versions(storage, NAME) == [1]
    assert (tmp_path / "acme/support/1" / WEIGHTS_FILE).stat().st_size == 1000


def test_an_alias_file_that_is_a_pipe_is_not_opened(tmp_path):
    publish(tmp_path, NAME, write)
    os.mkfifo(tmp_path / "acme/support" / ALIASES_FILE)
    with pytest.raises(StorageError, match="no regular file"):
        read_aliases(open_storage(tmp_path), NAME)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_what_is_not_permitted_is_said_so_in_a_directory(tmp_path):
    publish(tmp_path, NAME, write)
    (tmp_path / "acme/support").chmod(0o500)
    with pytest.raises(StorageDeniedError):
        set_alias(open_storage(tmp_path), NAME, STABLE, Target(1))
