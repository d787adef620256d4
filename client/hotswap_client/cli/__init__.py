"""The `hotswap` command. `main` needs the extra `cli`; everything else here is imported when it is used."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command with the process's arguments, and exit."""
    try:
        import typer  # noqa: F401
    except ModuleNotFoundError:
        print("error: the command line needs typer: pip install 'hotswap[cli]'", file=sys.stderr)
        sys.exit(2)
    from hotswap_client.cli._app import app

    app(prog_name="hotswap")


__all__ = ["main"]
