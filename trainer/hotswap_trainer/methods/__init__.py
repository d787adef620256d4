"""The training methods. Each module here that defines `METHOD` is one; a new method is a new file."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from typing import Any

from hotswap_trainer.method import Method


@cache
def available() -> dict[str, Method[Any]]:
    """Every method by its name."""
    modules = (
        importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__)
    )
    found = [module.METHOD for module in modules]
    return {method.name: method for method in sorted(found, key=lambda method: str(method.name))}
