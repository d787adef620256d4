"""Where a run keeps its checkpoints, so that the same command goes on after a kill."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hotswap_trainer.errors import OptionError, RunInProgressError

_MARKER = "hotswap_complete.json"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A complete checkpoint. `seconds` is the training time that led to it."""

    path: Path
    step: int
    seconds: float


class WorkDir:
    """A directory of checkpoints for one run: the same options, data and base find the same directory."""

    def __init__(self, root: Path | None, identity: Mapping[str, Any]) -> None:
        text = json.dumps(identity, sort_keys=True, default=str)
        self.path = (root or _default_root()) / hashlib.sha256(text.encode()).hexdigest()[:16]
        self._lock: Any = None

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def open(self) -> None:
        """Create and lock the directory. The lock goes with the process, however that ends.

        Raises:
            OptionError: it cannot be created.
            RunInProgressError: another process trains the same run.
        """
        from filelock import FileLock, Timeout

        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(self.path / "lock", timeout=0)
            self._lock.acquire()
        except Timeout:
            raise RunInProgressError(
                "another process is training this very run (same options and data); wait for it or stop it"
            ) from None
        except OSError as error:
            raise OptionError(f"--work-dir: cannot write {self.path}: {error.strerror}") from error

    def last_checkpoint(self) -> Checkpoint | None:
        """The newest complete checkpoint: a kill can leave a later one half-written."""
        complete = [
            Checkpoint(
                path.parent, int(path.parent.name.rpartition("-")[2]), json.loads(path.read_text())["seconds"]
            )
            for path in self.checkpoints.glob(f"checkpoint-*/{_MARKER}")
        ]
        return max(complete, key=lambda checkpoint: checkpoint.step, default=None)

    def discard_incomplete(self) -> None:
        """Remove what kills left half-written; otherwise it counts among the checkpoints to keep."""
        for path in self.checkpoints.glob("checkpoint-*"):
            if not (path / _MARKER).exists():
                shutil.rmtree(path, ignore_errors=True)

    def clear(self) -> None:
        """Remove every checkpoint."""
        shutil.rmtree(self.checkpoints, ignore_errors=True)
        self.checkpoints.mkdir(parents=True, exist_ok=True)

    def remove(self) -> None:
        """Remove the directory, when the run has been published."""
        if self._lock is not None:
            self._lock.release()
        shutil.rmtree(self.path, ignore_errors=True)


def mark_complete(checkpoint: Path, seconds: float) -> None:
    """Say that every file of a checkpoint is there. `seconds` of training led to it."""
    for path in checkpoint.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    temporary = checkpoint / f".{_MARKER}"
    temporary.write_text(json.dumps({"seconds": seconds}))
    temporary.rename(checkpoint / _MARKER)


def _default_root() -> Path:
    import platformdirs

    return Path(os.environ.get("HOTSWAP_CACHE_DIR") or platformdirs.user_cache_dir("hotswap")) / "runs"
