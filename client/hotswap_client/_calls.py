"""From keyword arguments to calls: one function per rpc, shared by the sync and the asyncio client."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Generic, TypedDict, TypeVar

from google.protobuf.message import Message
from hotswap.v1 import adapters_pb2, common_pb2, inference_pb2

from hotswap_client import _parsing
from hotswap_client._errors import InvalidCall
from hotswap_client._results import (
    Adapter,
    AdapterTransition,
    GenerateResult,
    InUsePolicy,
    MethodCost,
    Residency,
    ScoreResult,
    StreamDelta,
    TokenizeResult,
    UnloadResult,
)

Result = TypeVar("Result")


class Default(Enum):
    """The type of a timeout that a call leaves to its client; None means no limit there."""

    CLIENT = "client"


Timeout = float | None | Default


@dataclass(frozen=True, slots=True)
class Call(Generic[Result]):
    """An rpc about to be made: its full method name, its request, how to read a reply, and the adapter."""

    method: str
    request: Message
    response: type[Message]
    parse: Callable[[Any], Result]
    adapter: str
    timeout: Timeout


class TimeoutOption(TypedDict, total=False):
    """`timeout` in seconds; None waits for ever; absent takes the client's."""

    timeout: float | None


class InputOptions(TimeoutOption, total=False):
    """What the model reads: one of `prompt`, `messages` (each `{"role": …, "content": …}`), `token_ids`."""

    prompt: str | None
    messages: Sequence[Mapping[str, str]] | None
    token_ids: Sequence[int] | None


class GenerateOptions(InputOptions, total=False):
    """Options of `generate` and `stream`; what is absent or None takes the server's default.

    `adapter` is `tenant/name`, `tenant/name@3` or `tenant/name@stable` (absent: the base); `version`, 1 or
    more, may stand in place of the `@3`. `routing_key` chooses between an alias's version and its canary.
    `max_new_tokens` 1 or more; `temperature` 0 (greedy) to 100, default 1; `top_p` over 0 to 1; `top_k` 0
    (off) or more; `min_p` 0 (off) to 1; `repetition_penalty` over 0 to 100, 1 is off; `seed` 0 to 2**63-1;
    `stop` up to 16 strings; `logprobs` 0 to 20 candidates per token.
    """

    adapter: str | None
    version: int | None
    routing_key: str | None
    max_new_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    repetition_penalty: float | None
    seed: int | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    ignore_eos: bool | None
    logprobs: int | None


class ScoreOptions(TimeoutOption, total=False):
    """What to score, `text` or `token_ids`, after a context: at most one of `context`, `context_messages`,
    `context_token_ids`. `top_logprobs` 0 to 20 candidates per token."""

    adapter: str | None
    version: int | None
    routing_key: str | None
    text: str | None
    token_ids: Sequence[int] | None
    context: str | None
    context_messages: Sequence[Mapping[str, str]] | None
    context_token_ids: Sequence[int] | None
    top_logprobs: int | None


class TokenizeOptions(InputOptions, total=False):
    """`add_generation_prompt`: whether a conversation ends with the assistant's opening, default true."""

    add_generation_prompt: bool | None


class AdapterOptions(TimeoutOption, total=False):
    """`version` 1 or more; absent as the call's documentation says."""

    version: int | None


class CalibrateOptions(TimeoutOption, total=False):
    """`only_resident` leaves out methods that have no adapter on the device, instead of making some up."""

    only_resident: bool


class ListOptions(TimeoutOption, total=False):
    """`name_prefix` such as `tenant/`; `all_versions` lists old ones too; `page_size` 1 to 1000 a request."""

    name_prefix: str
    all_versions: bool
    page_size: int | None


def generate(*, timeout: Timeout = Default.CLIENT, **options: Any) -> Call[GenerateResult]:
    request = _set(inference_pb2.GenerateRequest(), "", **_generation(**options))
    return _inference("Generate", request, inference_pb2.GenerateResponse, _parsing.generation, timeout)


def stream(
    parse: Callable[[Any], StreamDelta], *, timeout: Timeout = Default.CLIENT, **options: Any
) -> Call[StreamDelta]:
    request = _set(inference_pb2.GenerateStreamRequest(), "", **_generation(**options))
    return _inference("GenerateStream", request, inference_pb2.GenerateStreamResponse, parse, timeout)


def score(
    *,
    adapter: str | None = None,
    version: int | None = None,
    routing_key: str | None = None,
    text: str | None = None,
    token_ids: Sequence[int] | None = None,
    context: str | None = None,
    context_messages: Sequence[Mapping[str, str]] | None = None,
    context_token_ids: Sequence[int] | None = None,
    top_logprobs: int | None = None,
    timeout: Timeout = Default.CLIENT,
) -> Call[ScoreResult]:
    _one_of("target", text=text, token_ids=token_ids)
    contexts = {
        "context": context,
        "context_messages": context_messages,
        "context_token_ids": context_token_ids,
    }
    before = None
    if any(value is not None for value in contexts.values()):
        _one_of("context", **contexts)
        before = _input(context, context_messages, context_token_ids)
    request = _set(
        inference_pb2.ScoreRequest(),
        "",
        adapter=adapter,
        version=version,
        routing_key=routing_key,
        text=text,
        token_ids=_token_ids(token_ids),
        context=before,
        top_logprobs=top_logprobs,
    )
    return _inference("Score", request, inference_pb2.ScoreResponse, _parsing.score, timeout)


def tokenize(
    *,
    prompt: str | None = None,
    messages: Sequence[Mapping[str, str]] | None = None,
    token_ids: Sequence[int] | None = None,
    add_generation_prompt: bool | None = None,
    timeout: Timeout = Default.CLIENT,
) -> Call[TokenizeResult]:
    _one_of("input", prompt=prompt, messages=messages, token_ids=token_ids)
    what = _input(prompt, messages, token_ids, add_generation_prompt)
    request = inference_pb2.TokenizeRequest(input=what)
    return _inference("Tokenize", request, inference_pb2.TokenizeResponse, _parsing.tokens, timeout)


def list_adapters(
    page_token: str,
    *,
    name_prefix: str = "",
    all_versions: bool = False,
    page_size: int | None = None,
    timeout: Timeout = Default.CLIENT,
) -> Call[tuple[tuple[Adapter, ...], str]]:
    request = _set(
        adapters_pb2.ListAdaptersRequest(),
        "",
        page_token=page_token,
        name_prefix=name_prefix,
        all_versions=all_versions,
        page_size=page_size,
    )
    return _admin(
        "List", request, adapters_pb2.ListAdaptersResponse, _parsing.adapter_page, timeout, plural=True
    )


def show(name: str, *, version: int | None = None, timeout: Timeout = Default.CLIENT) -> Call[Adapter]:
    request = _set(adapters_pb2.GetAdapterRequest(), "", name=name, version=version)
    return _admin("Get", request, adapters_pb2.GetAdapterResponse, _parsing.only_adapter, timeout)


def load(
    name: str, to: Residency | str, *, version: int | None = None, timeout: Timeout = Default.CLIENT
) -> Call[AdapterTransition]:
    if to not in (Residency.DEVICE, Residency.HOST):
        raise InvalidCall("to", f"must be device or host, got {to!r}")
    request = _set(adapters_pb2.LoadAdapterRequest(), "", name=name, version=version)
    if to == Residency.HOST:
        request.residency = adapters_pb2.RESIDENCY_HOST
    return _admin("Load", request, adapters_pb2.LoadAdapterResponse, _parsing.loaded, timeout)


def unload(
    name: str, in_use: InUsePolicy | str, *, version: int | None = None, timeout: Timeout = Default.CLIENT
) -> Call[UnloadResult]:
    try:
        policy = adapters_pb2.InUsePolicy.Value(f"IN_USE_POLICY_{InUsePolicy(in_use).name}")
    except ValueError as error:
        raise InvalidCall("in_use", f"{error}; use one of {', '.join(InUsePolicy)}") from None
    request = _set(adapters_pb2.UnloadAdapterRequest(in_use=policy), "", name=name, version=version)
    return _admin("Unload", request, adapters_pb2.UnloadAdapterResponse, _parsing.unloaded, timeout)


def pin(name: str, *, version: int | None = None, timeout: Timeout = Default.CLIENT) -> Call[Adapter]:
    request = _set(adapters_pb2.PinAdapterRequest(), "", name=name, version=version)
    return _admin("Pin", request, adapters_pb2.PinAdapterResponse, _parsing.only_adapter, timeout)


def unpin(
    name: str, *, version: int | None = None, timeout: Timeout = Default.CLIENT
) -> Call[tuple[Adapter, ...]]:
    request = _set(adapters_pb2.UnpinAdapterRequest(), "", name=name, version=version)
    return _admin("Unpin", request, adapters_pb2.UnpinAdapterResponse, _parsing.adapters, timeout)


def merge(
    name: str, *, version: int | None = None, timeout: Timeout = Default.CLIENT
) -> Call[AdapterTransition]:
    request = _set(adapters_pb2.MergeAdapterRequest(), "", name=name, version=version)
    return _admin("Merge", request, adapters_pb2.MergeAdapterResponse, _parsing.merged, timeout)


def unmerge(
    name: str, *, version: int | None = None, timeout: Timeout = Default.CLIENT
) -> Call[AdapterTransition]:
    request = _set(adapters_pb2.UnmergeAdapterRequest(), "", name=name, version=version)
    return _admin("Unmerge", request, adapters_pb2.UnmergeAdapterResponse, _parsing.unmerged, timeout)


def calibrate(
    *, only_resident: bool = False, timeout: Timeout = Default.CLIENT
) -> Call[tuple[MethodCost, ...]]:
    return Call(
        "/hotswap.v1.AdapterService/CalibrateMethods",
        adapters_pb2.CalibrateMethodsRequest(only_resident=only_resident),
        adapters_pb2.CalibrateMethodsResponse,
        _parsing.method_costs,
        "",
        timeout,
    )


def _inference(
    rpc: str, request: Any, response: type[Message], parse: Callable[[Any], Result], timeout: Timeout
) -> Call[Result]:
    return Call(
        f"/hotswap.v1.InferenceService/{rpc}",
        request,
        response,
        parse,
        getattr(request, "adapter", ""),
        timeout,
    )


def _admin(
    verb: str,
    request: Any,
    response: type[Message],
    parse: Callable[[Any], Result],
    timeout: Timeout,
    *,
    plural: bool = False,
) -> Call[Result]:
    method = f"/hotswap.v1.AdapterService/{verb}Adapter{'s' if plural else ''}"
    return Call(method, request, response, parse, getattr(request, "name", ""), timeout)


def _generation(
    *,
    adapter: str | None = None,
    version: int | None = None,
    routing_key: str | None = None,
    prompt: str | None = None,
    messages: Sequence[Mapping[str, str]] | None = None,
    token_ids: Sequence[int] | None = None,
    stop: str | Sequence[str] | None = None,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    seed: int | None = None,
    stop_token_ids: Sequence[int] | None = None,
    ignore_eos: bool | None = None,
    logprobs: int | None = None,
) -> dict[str, Any]:
    _one_of("input", prompt=prompt, messages=messages, token_ids=token_ids)
    sampling = _set(
        inference_pb2.SamplingParams(),
        "sampling.",
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=[stop] if isinstance(stop, str) else stop,
        stop_token_ids=stop_token_ids,
        ignore_eos=ignore_eos,
        logprobs=logprobs,
    )
    return {
        "adapter": adapter,
        "version": version,
        "routing_key": routing_key,
        "input": _input(prompt, messages, token_ids),
        "sampling": sampling,
    }


def _one_of(field: str, **choices: object) -> None:
    given = [name for name, value in choices.items() if value is not None]
    if len(given) != 1:
        found = " and ".join(given) or "none"
        raise InvalidCall(field, f"give exactly one of {', '.join(choices)}; got {found}")


def _input(
    prompt: str | None,
    messages: Sequence[Mapping[str, str]] | None,
    token_ids: Sequence[int] | None,
    add_generation_prompt: bool | None = None,
) -> common_pb2.Input:
    chat = None
    if messages is not None:
        try:
            turns = [common_pb2.ChatMessage(**message) for message in messages]
        except (TypeError, ValueError) as error:
            raise InvalidCall("input.messages", f"each message is a role and a content: {error}") from None
        chat = _set(
            common_pb2.ChatMessages(messages=turns),
            "input.messages.",
            add_generation_prompt=add_generation_prompt,
        )
    return _set(common_pb2.Input(), "input.", prompt=prompt, messages=chat, token_ids=_token_ids(token_ids))


def _token_ids(ids: Sequence[int] | None) -> common_pb2.TokenIds | None:
    return None if ids is None else _set(common_pb2.TokenIds(), "token_ids.", ids=ids)


AnyMessage = TypeVar("AnyMessage", bound=Message)


def _set(message: AnyMessage, prefix: str, **fields: Any) -> AnyMessage:
    """Set the fields that are not None. Raises InvalidCall, with the field, for what cannot be encoded."""
    for name, value in fields.items():
        if value is None:
            continue
        try:
            # One field at a time, since protobuf's own errors do not always name the field.
            message.MergeFrom(type(message)(**{name: value}))
        except (TypeError, ValueError) as error:
            raise InvalidCall(f"{prefix}{name}", f"{prefix}{name}: {error}") from None
    return message
