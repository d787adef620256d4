"""Stores of each kind to test with: a directory, fsspec's memory, and S3 from moto's server on loopback."""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import fsspec

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
