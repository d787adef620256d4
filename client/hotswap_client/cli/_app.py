"""The command itself: verbs come from entry points and are imported only when they run."""

from __future__ import annotations

import functools
from importlib import metadata
from typing import Annotated, Any, ClassVar

import typer
from typer.core import TyperCommand, TyperGroup

from hotswap_client import HotswapError
from hotswap_client.cli._verbs import ADAPTERS_GROUP, GROUP, VARIANTS_GROUP, Verb, discover

_ASKED = "hotswap.verb"


class VerbGroup(TyperGroup):
    """A group whose commands are its own, and the entry points of `group`.

    Listing and help show a placeholder with the verb's summary; `resolve_command`, which only a run or a
    completion reaches, imports the verb.
    """

    group: ClassVar[str] = GROUP

    @functools.cached_property
    def verbs(self) -> dict[str, Verb]:
        return discover(self.group)

    @functools.cached_property
    def variants(self) -> dict[str, Verb]:
        return discover(VARIANTS_GROUP) if self.group == GROUP else {}

    def list_commands(self, ctx: typer.Context) -> list[str]:  # type: ignore[override]
        own = [name for name in super().list_commands(ctx) if name not in self.verbs]
        return [*own, *sorted(self.verbs)]

    def get_command(self, ctx: typer.Context, cmd_name: str) -> Any:  # type: ignore[override]
        if cmd_name not in self.commands and cmd_name in self.verbs:
            return TyperCommand(name=cmd_name, help=self.verbs[cmd_name].summary())
        return self.commands.get(cmd_name)

    def resolve_command(self, ctx: typer.Context, args: list[str]) -> Any:  # type: ignore[override]
        asked = f"{_ASKED}.{self.group}"  # contexts of groups in groups share it
        ctx.meta[asked] = verb = self.verbs.get(args[0])
        for flag in args[1:]:
            if flag.startswith("--") and (variant := self.variants.get(f"{args[0]}.{flag[2:]}")) is not None:
                ctx.meta[asked] = variant
                command = variant.load()
                command.name = variant.title
                return command.name, command, [other for other in args[1:] if other != flag]
        if verb is not None and args[0] not in self.commands:
            self.commands[args[0]] = verb.load()
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        try:
            return super().invoke(ctx)
        except HotswapError as error:
            typer.echo(f"error: {error.code.name}: {' '.join(str(error).split())}", err=True)
            if "failed to connect" in str(error).lower():
                typer.echo("Is `hotswap serve` running there? --target says where to look.", err=True)
            raise typer.Exit(1) from None
        except ModuleNotFoundError as error:
            # Verbs import heavy libraries when they run, so this covers both the import and the run.
            verb = ctx.meta.get(f"{_ASKED}.{self.group}")
            if verb is None or not verb.lacks_extra(error):
                raise
            typer.echo(
                f"error: `{ctx.command_path} {verb.title}` needs {error.name}, which is not installed: "
                f"{verb.remedy()}",
                err=True,
            )
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            raise typer.Exit(130) from None


class AdaptersGroup(VerbGroup):
    """`hotswap adapters`: the client's commands, and those of `hotswap.adapters_verbs`."""

    group = ADAPTERS_GROUP


app = typer.Typer(
    cls=VerbGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Train adapters, serve them over one base model, and ask them for text.",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"hotswap {metadata.version('hotswap')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    pass
