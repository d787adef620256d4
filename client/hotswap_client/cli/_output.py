"""How results look as JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import typer


def print_json(value: Any) -> None:
    """Print a result, or a list of them, as JSON."""
    many = isinstance(value, Sequence)
    plain = [dataclasses.asdict(entry) for entry in value] if many else dataclasses.asdict(value)
    typer.echo(json.dumps(plain, ensure_ascii=False, indent=2))
