"""`hotswap generate`: text from a running server."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Annotated

import typer

from hotswap_client import Client, GenerateOptions
from hotswap_client.cli._connection import with_client
from hotswap_client.cli._output import print_json


@with_client
def command(
    client: Client,
    prompt: Annotated[str | None, typer.Argument(help="The prompt. Absent or -: standard input.")] = None,
    messages: Annotated[
        str | None, typer.Option(help='A conversation instead, JSON: [{"role": "user", "content": "…"}].')
    ] = None,
    adapter: Annotated[
        str | None, typer.Option(help="TENANT/NAME, or with @VERSION or @ALIAS. Absent: the base model.")
    ] = None,
    version: Annotated[int | None, typer.Option(help="The adapter's version, in place of @VERSION.")] = None,
    routing_key: Annotated[
        str | None, typer.Option(help="Equal keys get the same version of an alias with a canary.")
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="The most new tokens.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 (greedy) to 100. Absent: 1.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Over 0 to 1 (off).")] = None,
    top_k: Annotated[int | None, typer.Option(help="0 (off) or more.")] = None,
    min_p: Annotated[float | None, typer.Option(help="0 (off) to 1.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Over 0 to 100; 1 is off.")] = None,
    seed: Annotated[int | None, typer.Option(help="Fixes the random choices.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="A string that ends the text; may repeat.")] = None,
    stop_token_id: Annotated[
        list[int] | None, typer.Option(help="A token id that ends the text; may repeat.")
    ] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after end-of-sequence.")] = False,
    logprobs: Annotated[
        int | None, typer.Option(help="With --json: log-probabilities of this many candidates, 0 to 20.")
    ] = None,
    stream: Annotated[bool, typer.Option(help="Print the text as it comes.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole result as JSON.")] = False,
) -> None:
    """Generate text with the base model or an adapter."""
    options = GenerateOptions(
        adapter=adapter,
        version=version,
        routing_key=routing_key,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=stop,
        stop_token_ids=stop_token_id,
        ignore_eos=ignore_eos or None,
        logprobs=logprobs,
    )
    if messages is None:
        options["prompt"] = sys.stdin.read() if prompt in (None, "-") else prompt
    elif prompt is None:
        options["messages"] = _conversation(messages)
    else:
        raise typer.BadParameter("give a prompt or --messages, not both", param_hint="--messages")
    if as_json:
        print_json(client.generate(**options))
    elif stream:
        with client.stream(**options) as deltas:
            for delta in deltas:
                typer.echo(delta.text, nl=False)
                sys.stdout.flush()
        typer.echo()
    else:
        typer.echo(client.generate(**options).text)


def _conversation(text: str) -> Sequence[Mapping[str, str]]:
    try:
        messages = json.loads(text)
    except ValueError as error:
        raise typer.BadParameter(f"not JSON: {error}", param_hint="--messages") from None
    if not (isinstance(messages, list) and all(isinstance(message, dict) for message in messages)):
        raise typer.BadParameter("must be a list of objects with role and content", param_hint="--messages")
    return messages
