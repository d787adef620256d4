"""Training by `hotswap train`, once for the same data, method, options, seed and base."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hotswap.bases import BaseConversionError, BaseNotFoundError, resolve_base
from hotswap.layout import version_path, versions_in
from hotswap.names import AdapterName

from hotswap_client.cli.compare.options import CompareError, CompareOptions
from hotswap_client.cli.compare.questions import Material
from hotswap_client.cli.demo import processes

TENANT = "compare"


@dataclass(frozen=True, slots=True)
class Base:
    """A base as the user names it, its directory, a SHA-256 of its content and its size."""

    spec: str
    path: Path
    digest: str
    weight_bytes: int


@dataclass(frozen=True, slots=True)
class Trained:
    """A version in the store, and what its `training.json` says. Memory is in bytes, by where it is."""

    method: str
    adapter: str
    version: int
    path: Path
    settings: Mapping[str, str]
    trainable: int
    percent: float
    steps: int
    seconds: float
    peak_memory: Mapping[str, int]
    checkpoint_bytes: int
    losses: tuple[tuple[int, float], ...]
    """Steps and training losses."""

    versions: Mapping[str, str]

    @property
    def memory(self) -> int:
        """The accelerator's peak where there is one, else the process's."""
        return self.peak_memory.get("accelerator") or self.peak_memory["host"]


def open_base(spec: str) -> Base:
    """Raises:
    CompareError: there is no such base.
    """
    try:
        path = resolve_base(spec)
    except (BaseNotFoundError, BaseConversionError) as error:
        raise CompareError(f"--{error}") from None
    digest = hashlib.sha256()
    weights = sorted(path.glob("*.safetensors"))
    for file in (path / "config.json", *sorted(path.glob("tokenizer*.json")), *weights):
        digest.update(file.name.encode())
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return Base(spec, path, digest.hexdigest(), sum(file.stat().st_size for file in weights))


def adapter_name(options: CompareOptions, method: str, material: Material, base: Base) -> str:
    """`compare/METHOD-KEY`: the key is of all that decides what training ends with."""
    identity = [material.train_digest, base.digest, options.training(method)]
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    return f"{TENANT}/{method}-{key}"


def find(method: str, adapter: str, store: Path, settings: Mapping[str, str]) -> Trained | None:
    """The newest version of the adapter, if there is one."""
    name = AdapterName.parse(adapter)
    folder = store / name.tenant / name.name
    if not folder.is_dir():
        return None
    version = max(versions_in(path.name for path in folder.iterdir()), default=None)
    if version is None:
        return None
    path = version_path(store, name, version)
    try:
        report: dict[str, Any] = json.loads((path / "training.json").read_text("utf-8"))
        points = [point for point in report["loss"]["history"] if point["kind"] == "train"]
        return Trained(
            method=method,
            adapter=adapter,
            version=version,
            path=path,
            settings=settings,
            trainable=report["parameters"]["trainable"],
            percent=report["parameters"]["percent"],
            steps=report["steps"],
            seconds=report["wall_seconds"],
            peak_memory=report["peak_memory_bytes"],
            checkpoint_bytes=sum(file.stat().st_size for file in path.glob("*.safetensors")),
            losses=tuple((point["step"], point["loss"]) for point in points),
            versions=report["versions"],
        )
    except (OSError, ValueError, LookupError, TypeError):  # not by this trainer
        return None


def train(options: CompareOptions, method: str, adapter: str, material: Material) -> Trained:
    """Run `hotswap train` with its progress on our standard error.

    Raises:
        CompareError: it failed; it has said why on standard error.
    """
    settings = options.training(method)
    where = {
        "base": options.base,
        "data": str(material.train_file),
        "name": adapter,
        "output": str(options.store),
    }
    flags = [
        part for key, value in (where | settings).items() for part in (f"--{key.replace('_', '-')}", value)
    ]
    command = [*processes.HOTSWAP, "train", *flags]
    # An interrupted trainer mends the terminal, which a terminated one would leave without a cursor.
    with processes.running(command, signal.SIGINT, stdout=subprocess.DEVNULL) as process:
        code = process.wait()
    if code != 0:
        raise CompareError(
            f"training with {method} failed with exit code {code}; what it printed says why, and --methods "
            "can leave it out"
        )
    trained = find(method, adapter, options.store, settings)
    if trained is None:
        raise CompareError(f"training with {method} ended, but {options.store} has no {adapter}; try --fresh")
    return trained
