"""Verbs of the command and of its groups: entry points, described without importing them."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Any

import typer

GROUP = "hotswap.verbs"
ADAPTERS_GROUP = "hotswap.adapters_verbs"
"""What other packages add to `hotswap adapters`."""
VARIANTS_GROUP = "hotswap.variants"
"""What runs instead of a verb that is given a flag: `plan.fleet` is `hotswap plan --fleet`."""

_EXTRAS = {"hotswap_client": "cli", "hotswap_server": "server", "hotswap_trainer": "trainer"}
"""The extra that brings what a package's verbs import."""


@dataclass(frozen=True, slots=True)
class Verb:
    """One entry point: its value is a `typer.Typer` app or a function for typer to wrap."""

    name: str
    module: str
    attribute: str

    @property
    def title(self) -> str:
        """As it is typed."""
        return self.name.replace(".", " --")

    def summary(self) -> str:
        """The first line of the function's docstring, or of the module's for an app; empty if unknown.

        Read from the source, since importing a verb to describe it would import all that it needs.
        """
        path = _source(self.module)
        if path is None:
            return ""
        tree = ast.parse(path.read_bytes())
        described: ast.Module | ast.FunctionDef = tree
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and node.name == self.attribute:
                described = node
        docstring = ast.get_docstring(described) or ""
        return docstring.partition("\n")[0]

    def load(self) -> Any:
        """Import the verb and make a command of it, named after the entry point."""
        value = metadata.EntryPoint(self.name, f"{self.module}:{self.attribute}", GROUP).load()
        if not isinstance(value, typer.Typer):
            function, value = value, typer.Typer(add_completion=False)
            value.command()(function)
        value._add_completion = False
        command = typer.main.get_command(value)
        command.name = self.name
        return command

    def lacks_extra(self, error: ModuleNotFoundError) -> bool:
        """Whether the missing module belongs to an extra, and is not a mistake in our own packages."""
        return (error.name or "hotswap").partition(".")[0] not in {"hotswap", *_EXTRAS}

    def remedy(self) -> str:
        extra = _EXTRAS.get(self.module.partition(".")[0])
        return f"install what {self.module} needs" if extra is None else f"pip install 'hotswap[{extra}]'"


def discover(group: str = GROUP) -> dict[str, Verb]:
    """The installed verbs of a group by name."""
    points = metadata.entry_points(group=group)
    return {point.name: Verb(point.name, point.module, point.attr) for point in points}


def _source(module: str) -> Path | None:
    """The file of a module. Only the top package is looked up, as finding a submodule imports its parents."""
    package, *parts = module.split(".")
    spec = util.find_spec(package)
    for location in (spec.submodule_search_locations if spec else None) or ():
        stem = Path(location, *parts)
        for path in (stem.with_suffix(".py"), stem / "__init__.py"):
            if path.is_file():
                return path
    return None
