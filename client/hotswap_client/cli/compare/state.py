"""What has been measured so far, so that an interrupted comparison goes on where it was."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

FILE = "measurements.json"


def key_of(*parts: Any) -> str:
    """A key of JSON values: other values, another key."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:24]


class State:
    """JSON values by key, in a file of the report's folder that is replaced at each change."""

    def __init__(self, folder: Path, *, forget: bool = False) -> None:
        self._path = folder / FILE
        self._values: dict[str, Any] = {}
        if not forget:
            try:
                found = json.loads(self._path.read_text("utf-8"))
            except (OSError, ValueError):  # none there yet, or damaged: measured again
                found = None
            self._values = found if isinstance(found, dict) else {}

    def get(self, key: str) -> Any:
        """The value, or None."""
        return self._values.get(key)

    def put(self, key: str, value: Any) -> None:
        self._values[key] = value
        self._path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._path.with_suffix(".part")
        temporary.write_text(json.dumps(self._values), "utf-8")
        temporary.replace(self._path)
