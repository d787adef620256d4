"""A store in memory whose reads do what a test says: take their time, fail, or find other bytes."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import fsspec
from fsspec.implementations.memory import MemoryFileSystem


class ScriptedFileSystem(MemoryFileSystem):  # type: ignore[misc]
    """`scripted://`: before a file is read, the first of `scripts` whose key is in its path runs."""

    protocol = "scripted"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    scripts: ClassVar[dict[str, Callable[[str], None]]] = {}
    reads: ClassVar[list[str]] = []

    @classmethod
    def _strip_protocol(cls, path: Any) -> str:
        return str(super()._strip_protocol(str(path).removeprefix("scripted://")))

    def cat_file(self, path: str, start: Any = None, end: Any = None, **options: Any) -> bytes:
        type(self).reads.append(path)
        script = next((script for part, script in self.scripts.items() if part in path), None)
        if script is not None:
            script(path)
        return bytes(super().cat_file(path, start, end, **options))


class ScriptedStore:
    """`url` opens it; `scripts` holds what reads do, by a part of the path."""

    def __init__(self) -> None:
        fsspec.register_implementation("scripted", ScriptedFileSystem, clobber=True)
        self.url = f"scripted://{uuid.uuid4().hex}"
        self.files = fsspec.filesystem("scripted")
        self.files.mkdir(self.url)
        self.scripts = ScriptedFileSystem.scripts
        self.reads = ScriptedFileSystem.reads

    def put(self, source: Path, directory: str) -> None:
        """Copy a PEFT directory to `directory`, such as `acme/a/1`."""
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            self.write(f"{directory}/{name}", (source / name).read_bytes())

    def write(self, path: str, content: bytes) -> None:
        self.files.pipe_file(f"{self.url}/{path}", content)

    def read(self, path: str) -> bytes:
        return bytes(self.files.store[f"/{self.url.removeprefix('scripted://')}/{path}"].getvalue())

    def remove(self, path: str) -> None:
        self.files.rm(f"{self.url}/{path}", recursive=True)


@contextmanager
def scripted_store() -> Iterator[ScriptedStore]:
    store = ScriptedStore()
    try:
        yield store
    finally:
        ScriptedFileSystem.scripts.clear()
        ScriptedFileSystem.reads.clear()
        store.files.rm(store.url, recursive=True)
