"""Stores of each kind to test with: a directory, fsspec's memory, and S3 from moto's server on loopback."""

from __future__ import annotations

import hashlib
import logging
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from unittest import mock

import fsspec
from hotswap.layout import CONFIG_FILE, MANIFEST_FILE, WEIGHTS_FILE
from hotswap.manifest import FileRecord, Manifest

BUCKET = "stores"


@contextmanager
def s3_server() -> Iterator[str]:
    """A server of S3 that this process's environment points at; its address."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    address = f"http://{host}:{port}"
    environment = {
        "AWS_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    try:
        with mock.patch.dict(os.environ, environment):
            fsspec.filesystem("s3").mkdir(BUCKET)
            yield address
    finally:
        server.stop()


@contextmanager
def memory_store() -> Iterator[str]:
    """The URL of an empty store in memory."""
    url = f"memory://{uuid.uuid4().hex}"
    filesystem = fsspec.filesystem("memory")
    filesystem.mkdir(url)
    try:
        yield url
    finally:
        filesystem.rm(url, recursive=True)


def s3_store() -> str:
    """The URL of an empty store on the server."""
    return f"s3://{BUCKET}/{uuid.uuid4().hex}"


def fill(url: str, adapter: str, weights: Mapping[int, bytes], config: bytes = b"{}") -> None:
    """Put versions into a store as `publish` leaves them, all in one go."""
    options = {} if "://" in url else {"auto_mkdir": True}
    filesystem, root = fsspec.core.url_to_fs(url, **options)
    objects: dict[str, bytes] = {}
    for version, content in weights.items():
        files = {CONFIG_FILE: config, WEIGHTS_FILE: content}
        records = {
            file: FileRecord(len(data), hashlib.sha256(data).hexdigest()) for file, data in files.items()
        }
        files[MANIFEST_FILE] = Manifest(records).to_json()
        objects |= {f"{root}/{adapter}/{version}/{file}": data for file, data in files.items()}
    filesystem.pipe(objects)
