import multiprocessing
import os
import random
import signal
import stat
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import hotswap.publish_directory
import pytest
from hotswap.layout import (
    CONFIG_FILE,
    MANIFEST_FILE,
    WEIGHTS_FILE,
    PublishError,
    content_digest,
    next_version,
    publish,
    version_path,
    versions_in,
)
from hotswap.manifest import Manifest
from hotswap.names import AdapterName

NAME = AdapterName("acme", "support")
CONTENT = b"w" * 1000


def write(directory: Path) -> None:
    (directory / CONFIG_FILE).write_bytes(b"{}")
    (directory / WEIGHTS_FILE).write_bytes(CONTENT)


def everything(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


def test_versions_count_up_from_one(tmp_path):
    store = tmp_path / "store"
    assert [publish(store, NAME, write) for _ in range(3)] == [1, 2, 3]
    directory = version_path(store, NAME, 3)
    assert (directory / CONFIG_FILE).read_bytes() == b"{}"
    assert (directory / WEIGHTS_FILE).read_bytes() == CONTENT
    assert sorted(os.listdir(store / "acme" / "support")) == ["1", "2", "3"]
    assert Manifest.parse((directory / MANIFEST_FILE).read_bytes()).digest == content_digest(b"{}", CONTENT)


def test_the_next_version_follows_the_highest(tmp_path):
    (tmp_path / "acme/support/7").mkdir(parents=True)
    (tmp_path / "acme/support/notes.txt").touch()
    (tmp_path / "acme/support/08").mkdir()
    assert publish(tmp_path, NAME, write) == 8


def test_a_dropped_directory_is_version_one(tmp_path):
    (tmp_path / "acme/support").mkdir(parents=True)
    write(tmp_path / "acme/support")
    assert publish(tmp_path, NAME, write) == 2


def test_versions_in_ignores_what_is_no_version():
    assert versions_in(["10", "9", ".publish-1", "01", "0", "x", CONFIG_FILE]) == [9, 10]
    assert versions_in([CONFIG_FILE, WEIGHTS_FILE, "3"]) == [1, 3]


@pytest.mark.parametrize("existing", [True, False])
def test_an_exception_leaves_the_store_as_it_was(tmp_path, existing):
    store = tmp_path / "store"
    if existing:
        publish(store, NAME, write)
    before = everything(tmp_path)

    def fail(directory: Path) -> None:
        write(directory)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        publish(store, NAME, fail)
    assert everything(tmp_path) == before


@pytest.mark.parametrize("missing", [CONFIG_FILE, WEIGHTS_FILE])
def test_an_incomplete_directory_is_refused(tmp_path, missing):
    def write_most(directory: Path) -> None:
        write(directory)
        (directory / missing).unlink()

    with pytest.raises(PublishError, match=missing):
        publish(tmp_path / "store", NAME, write_most)
    assert everything(tmp_path) == []


@pytest.mark.parametrize("kind", ["link", "empty"])
def test_a_link_or_an_empty_file_is_refused(tmp_path, kind):
    def write_oddly(directory: Path) -> None:
        write(directory)
        (directory / WEIGHTS_FILE).unlink()
        if kind == "link":
            (directory / WEIGHTS_FILE).symlink_to("/etc/hostname")
        else:
            (directory / WEIGHTS_FILE).touch()

    with pytest.raises(PublishError, match="regular file"):
        publish(tmp_path, NAME, write_oddly)


def test_a_private_file_becomes_as_readable_as_the_umask_allows(tmp_path):
    def write_privately(directory: Path) -> None:
        write(directory)
        (directory / WEIGHTS_FILE).chmod(0o600)

    umask = os.umask(0o022)
    try:
        publish(tmp_path, NAME, write_privately)
    finally:
        os.umask(umask)
    directory = version_path(tmp_path, NAME, 1)
    assert stat.S_IMODE((directory / WEIGHTS_FILE).stat().st_mode) == 0o644
    assert stat.S_IMODE(directory.stat().st_mode) == 0o755


def test_a_version_that_another_publisher_took_is_not_replaced(tmp_path, monkeypatch):
    publish(tmp_path, NAME, write)
    (version_path(tmp_path, NAME, 1) / "mark").touch()
    seen = iter([[], ["1"]])  # the first look is from before the other one published
    monkeypatch.setattr(hotswap.publish_directory, "next_version", lambda entries: next_version(next(seen)))
    assert publish(tmp_path, NAME, write) == 2
    assert (version_path(tmp_path, NAME, 1) / "mark").exists()


def _publish_in_child(store: Path) -> int:
    return publish(store, NAME, write)


def test_concurrent_publishers_get_distinct_versions(tmp_path):
    with ProcessPoolExecutor(4, mp_context=multiprocessing.get_context("spawn")) as pool:
        versions = list(pool.map(_publish_in_child, [tmp_path / "store"] * 8))
    assert sorted(versions) == list(range(1, 9))
    assert sorted(os.listdir(tmp_path / "store/acme/support"), key=int) == [str(i) for i in range(1, 9)]


_PUBLISH_FOREVER = """
import sys, threading
from pathlib import Path
from hotswap.layout import CONFIG_FILE, WEIGHTS_FILE, publish
from hotswap.manifest import Manifest
from hotswap.names import AdapterName

def write(directory):
    (directory / CONFIG_FILE).write_bytes(b"{}")
    with open(directory / WEIGHTS_FILE, "wb") as file:
        for _ in range(50):
            file.write(b"w" * 20)
            file.flush()

print("ready", flush=True)
while True:
    publish(Path(sys.argv[1]), AdapterName("acme", "support"), write)
"""


def start_publisher(store: Path) -> subprocess.Popen[bytes]:
    paths = [str(Path(hotswap.layout.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    process = subprocess.Popen(
        [sys.executable, "-c", _PUBLISH_FOREVER, str(store)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    return process


def test_a_killed_publisher_leaves_whole_versions_only(tmp_path):
    store, randomness = tmp_path / "store", random.Random(0)
    for _ in range(6):
        with start_publisher(store) as process:
            time.sleep(randomness.uniform(0.0, 0.1))
            process.send_signal(signal.SIGKILL)
    task = store / "acme/support"
    versions = versions_in(os.listdir(task)) if task.exists() else []
    for version in versions:
        directory = version_path(store, NAME, version)
        assert sorted(os.listdir(directory)) == [CONFIG_FILE, WEIGHTS_FILE, MANIFEST_FILE]
        assert (directory / CONFIG_FILE).read_bytes() == b"{}"
        assert (directory / WEIGHTS_FILE).read_bytes() == CONTENT
    assert publish(store, NAME, write) == len(versions) + 1
    assert all(not entry.startswith(".") for entry in os.listdir(task)), "the dead one's directory is removed"


def test_a_living_publisher_keeps_its_temporary_directory(tmp_path):
    def write_beside_another(directory: Path) -> None:
        write(directory)
        assert publish(tmp_path, NAME, write) == 1
        assert (directory / WEIGHTS_FILE).exists()

    assert publish(tmp_path, NAME, write_beside_another) == 2


def test_another_hosts_temporary_directory_is_left_for_a_day(tmp_path):
    fresh, old = (tmp_path / "acme/support" / f".publish-elsewhere-{i}" for i in range(2))
    for directory in (fresh, old):
        directory.mkdir(parents=True)
    os.utime(old, (0, 0))
    publish(tmp_path, NAME, write)
    assert fresh.exists()
    assert not old.exists()


def test_the_digest_frames_names_and_lengths():
    digest = content_digest(b"ab", b"c")
    assert len(digest) == 64
    assert digest == content_digest([b"a", b"b"], iter([b"", b"c"]))
    assert (
        len({digest, content_digest(b"a", b"bc"), content_digest(b"c", b"ab"), content_digest(b"abc", b"")})
        == 4
    )
