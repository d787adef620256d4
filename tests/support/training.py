"""Processes that train, watched from outside."""

import subprocess
import time
from pathlib import Path


def as_arguments(options: dict[str, object]) -> list[str]:
    """Of the `train` command."""
    arguments: list[str] = []
    for key, value in options.items():
        flag = f"--{key.replace('_', '-')}"
        arguments += [flag] if value is True else [flag, str(value)]
    return arguments


def wait_for_checkpoint(process: subprocess.Popen[str], work_dir: Path, step: int) -> None:
    """Until a complete checkpoint at `step` or later is there."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[0]
        for marker in work_dir.glob("*/checkpoints/checkpoint-*/hotswap_complete.json"):
            if int(marker.parent.name.rpartition("-")[2]) >= step:
                return
        time.sleep(0.01)
    raise TimeoutError("no checkpoint")


def finish(process: subprocess.Popen[str]) -> str:
    """What it printed; it must end well."""
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    return output
