"""From the wire's messages to results. What a newer server may add becomes `UNKNOWN`."""

from __future__ import annotations

import json
from collections.abc import Iterable

from hotswap.v1 import adapters_pb2, common_pb2, inference_pb2

from hotswap_client._errors import Internal
from hotswap_client._results import (
    Adapter,
    AdapterTransition,
    FinishReason,
    GenerateResult,
    MethodCost,
    Residency,
    ScoreResult,
    ServingPath,
    StreamDelta,
    Timings,
    TokenizeResult,
    TokenLogprob,
    UnloadResult,
    Usage,
)

_FINISH_REASONS = {
    inference_pb2.FINISH_REASON_STOP_TOKEN: FinishReason.STOP_TOKEN,
    inference_pb2.FINISH_REASON_STOP_STRING: FinishReason.STOP_STRING,
    inference_pb2.FINISH_REASON_LENGTH: FinishReason.LENGTH,
}
_PATHS = {
    common_pb2.SERVING_PATH_BASE: ServingPath.BASE,
    common_pb2.SERVING_PATH_BATCHED: ServingPath.BATCHED,
    common_pb2.SERVING_PATH_MERGED: ServingPath.MERGED,
}
_RESIDENCIES = {
    adapters_pb2.RESIDENCY_STORE: Residency.STORE,
    adapters_pb2.RESIDENCY_HOST: Residency.HOST,
    adapters_pb2.RESIDENCY_DEVICE: Residency.DEVICE,
}


def generation(message: inference_pb2.GenerateResponse) -> GenerateResult:
    return _completion(
        message.completion, message.text, tuple(message.token_ids), _logprobs(message.logprobs)
    )


class StreamParser:
    """Turns a stream's messages into deltas and gathers them into `result`, which is None until the end."""

    def __init__(self) -> None:
        self.result: GenerateResult | None = None
        self._deltas: list[StreamDelta] = []

    def parse(self, message: inference_pb2.GenerateStreamResponse) -> StreamDelta:
        if message.HasField("completion"):
            self.result = _completion(
                message.completion,
                "".join(delta.text for delta in self._deltas),
                tuple(token for delta in self._deltas for token in delta.token_ids),
                tuple(entry for delta in self._deltas for entry in delta.logprobs),
            )
            return StreamDelta(text="", token_ids=(), result=self.result)
        delta = StreamDelta(
            text=message.delta.text,
            token_ids=tuple(message.delta.token_ids),
            logprobs=_logprobs(message.delta.logprobs),
        )
        self._deltas.append(delta)
        return delta

    def finish(self) -> None:
        """Called at the stream's end. Raises Internal if no completion came."""
        if self.result is None:
            raise Internal("the stream ended without saying how the generation ended")


def score(message: inference_pb2.ScoreResponse) -> ScoreResult:
    adapter = message.adapter
    return ScoreResult(
        logprobs=_logprobs(message.logprobs),
        total_logprob=message.total_logprob,
        adapter=adapter.name or None,
        version=adapter.version or None,
        digest=adapter.digest or None,
        method=adapter.method,
        path=_PATHS.get(message.path, ServingPath.UNKNOWN),
        usage=_usage(message.usage),
        timings=_timings(message.timings),
    )


def tokens(message: inference_pb2.TokenizeResponse) -> TokenizeResult:
    return TokenizeResult(token_ids=tuple(message.token_ids), count=message.count)


def adapter(message: adapters_pb2.Adapter) -> Adapter:
    return Adapter(
        name=message.name,
        version=message.version,
        digest=message.digest,
        method=message.method,
        size_bytes=message.size_bytes,
        num_parameters=message.num_parameters,
        method_config={name: _json(value) for name, value in sorted(message.method_config.items())},
        residency=_RESIDENCIES.get(message.residency, Residency.UNKNOWN),
        pinned=message.pinned,
        merged=message.merged,
        running_requests=message.running_requests,
        error=message.error,
    )


def adapters(
    message: adapters_pb2.ListAdaptersResponse | adapters_pb2.UnpinAdapterResponse,
) -> tuple[Adapter, ...]:
    return tuple(map(adapter, message.adapters))


def adapter_page(message: adapters_pb2.ListAdaptersResponse) -> tuple[tuple[Adapter, ...], str]:
    return adapters(message), message.next_page_token


def only_adapter(message: adapters_pb2.GetAdapterResponse | adapters_pb2.PinAdapterResponse) -> Adapter:
    return adapter(message.adapter)


def loaded(message: adapters_pb2.LoadAdapterResponse) -> AdapterTransition:
    return AdapterTransition(adapter(message.adapter), message.load_seconds)


def merged(message: adapters_pb2.MergeAdapterResponse) -> AdapterTransition:
    return AdapterTransition(adapter(message.adapter), message.merge_seconds)


def unmerged(message: adapters_pb2.UnmergeAdapterResponse) -> AdapterTransition:
    return AdapterTransition(adapter(message.adapter), message.unmerge_seconds)


def unloaded(message: adapters_pb2.UnloadAdapterResponse) -> UnloadResult:
    return UnloadResult(tuple(map(adapter, message.adapters)), message.cancelled_requests)


def method_costs(message: adapters_pb2.CalibrateMethodsResponse) -> tuple[MethodCost, ...]:
    return tuple(
        MethodCost(
            method=cost.method,
            path=_PATHS.get(cost.path, ServingPath.UNKNOWN),
            batch_size=cost.batch_size,
            overhead_ratio=cost.overhead_ratio,
            step_seconds=cost.step_seconds,
            adapters=cost.adapters,
            made_up=cost.made_up,
        )
        for cost in message.costs
    )


def _completion(
    message: inference_pb2.Completion,
    text: str,
    token_ids: tuple[int, ...],
    logprobs: tuple[TokenLogprob, ...],
) -> GenerateResult:
    return GenerateResult(
        text=text,
        token_ids=token_ids,
        finish_reason=_FINISH_REASONS.get(message.finish_reason, FinishReason.UNKNOWN),
        adapter=message.adapter.name or None,
        version=message.adapter.version or None,
        digest=message.adapter.digest or None,
        method=message.adapter.method,
        path=_PATHS.get(message.path, ServingPath.UNKNOWN),
        usage=_usage(message.usage),
        timings=_timings(message.timings),
        logprobs=logprobs,
    )


def _logprobs(entries: Iterable[common_pb2.TokenLogprob]) -> tuple[TokenLogprob, ...]:
    return tuple(
        TokenLogprob(entry.token_id, entry.logprob, tuple((top.token_id, top.logprob) for top in entry.top))
        for entry in entries
    )


def _usage(message: common_pb2.Usage) -> Usage:
    return Usage(message.prompt_tokens, message.generated_tokens)


def _timings(message: common_pb2.Timings) -> Timings:
    return Timings(
        queue=message.queue_seconds,
        load=message.load_seconds,
        prefill=message.prefill_seconds,
        decode=message.decode_seconds,
    )


def _json(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return text
