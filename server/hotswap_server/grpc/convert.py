"""Between messages and the server's nouns. A wrong value is an InvalidRequestError with the field's path."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Final

from hotswap.names import MAX_VERSION, AdapterReference, InvalidAdapterNameError
from hotswap.v1 import adapters_pb2, common_pb2, inference_pb2

from hotswap_server import core
from hotswap_server.adapters.residency import AdapterInfo, Residency
from hotswap_server.engine.calibration import MethodCost
from hotswap_server.errors import InvalidRequestError

_PATHS: Final = {
    core.ServingPath.BASE: common_pb2.SERVING_PATH_BASE,
    core.ServingPath.BATCHED: common_pb2.SERVING_PATH_BATCHED,
    core.ServingPath.MERGED: common_pb2.SERVING_PATH_MERGED,
}
_FINISH_REASONS: Final = {
    core.FinishReason.STOP_TOKEN: inference_pb2.FINISH_REASON_STOP_TOKEN,
    core.FinishReason.STOP_STRING: inference_pb2.FINISH_REASON_STOP_STRING,
    core.FinishReason.LENGTH: inference_pb2.FINISH_REASON_LENGTH,
}
_RESIDENCIES: Final = {
    Residency.STORE: adapters_pb2.RESIDENCY_STORE,
    Residency.HOST: adapters_pb2.RESIDENCY_HOST,
    Residency.DEVICE: adapters_pb2.RESIDENCY_DEVICE,
}


def adapter_reference(field: str, name: str, version: int | None) -> AdapterReference:
    """What a request's name and version say together."""
    if version is not None and not 1 <= version <= MAX_VERSION:
        raise InvalidRequestError("version", f"must be between 1 and {MAX_VERSION}, got {version}")
    try:
        reference = AdapterReference.parse(name)
    except InvalidAdapterNameError as error:
        raise InvalidRequestError(field, str(error)) from None
    if version is None:
        return reference
    if reference.version is not None or reference.alias is not None:
        raise InvalidRequestError("version", f"must be absent where {field} says it already, as {reference}")
    return replace(reference, version=version)


def checked_ids(field: str, ids: Iterable[int], vocab_size: int) -> tuple[int, ...]:
    """`ids` as a tuple, each 0 or more and below `vocab_size`."""
    result = tuple(ids)
    if result and (min(result) < 0 or max(result) >= vocab_size):
        index, wrong = next((i, id_) for i, id_ in enumerate(result) if not 0 <= id_ < vocab_size)
        raise InvalidRequestError(
            f"{field}[{index}]", f"must be 0 or more and below the vocabulary's {vocab_size}, got {wrong}"
        )
    return result


def sampling_params(message: inference_pb2.SamplingParams, vocab_size: int) -> core.SamplingParams:
    """An absent field takes the default of `core.SamplingParams`."""

    given = {descriptor.name: value for descriptor, value in message.ListFields()}
    if "stop" in given:
        given["stop"] = tuple(given["stop"])
    if "stop_token_ids" in given:
        given["stop_token_ids"] = checked_ids("sampling.stop_token_ids", given["stop_token_ids"], vocab_size)
    return core.SamplingParams(**given)


def token_logprobs(entries: Iterable[core.TokenLogprob]) -> list[common_pb2.TokenLogprob]:
    return [
        common_pb2.TokenLogprob(
            token_id=entry.token_id,
            logprob=entry.logprob,
            top=[common_pb2.TopLogprob(token_id=token, logprob=logprob) for token, logprob in entry.top],
        )
        for entry in entries
    ]


def delta(event: core.Delta) -> inference_pb2.Delta:
    return inference_pb2.Delta(
        text=event.text, token_ids=event.token_ids, logprobs=token_logprobs(event.logprobs)
    )


def completion(event: core.Finished, adapter: core.AdapterRef | None) -> inference_pb2.Completion:
    return inference_pb2.Completion(
        adapter=resolved_adapter(adapter),
        path=serving_path(event.path),
        finish_reason=_FINISH_REASONS[event.finish_reason],
        usage=common_pb2.Usage(
            prompt_tokens=event.num_prompt_tokens, generated_tokens=event.num_generated_tokens
        ),
        timings=timings(event.timings),
    )


def generation(events: Sequence[core.Delta]) -> inference_pb2.GenerateResponse:
    """The whole of a generation's deltas, without its completion."""
    return inference_pb2.GenerateResponse(
        text="".join(event.text for event in events),
        token_ids=[token for event in events for token in event.token_ids],
        logprobs=token_logprobs(entry for event in events for entry in event.logprobs),
    )


def score(event: core.Scored, adapter: core.AdapterRef | None) -> inference_pb2.ScoreResponse:
    return inference_pb2.ScoreResponse(
        logprobs=token_logprobs(event.logprobs),
        total_logprob=sum(entry.logprob for entry in event.logprobs),
        adapter=resolved_adapter(adapter),
        path=serving_path(event.path),
        usage=common_pb2.Usage(prompt_tokens=event.num_prompt_tokens),
        timings=timings(event.timings),
    )


def resolved_adapter(ref: core.AdapterRef | None) -> common_pb2.ResolvedAdapter:
    if ref is None:
        return common_pb2.ResolvedAdapter(method=core.BASE_METHOD)
    return common_pb2.ResolvedAdapter(
        name=ref.name, version=ref.version, digest=ref.digest, method=ref.method
    )


def serving_path(path: core.ServingPath) -> common_pb2.ServingPath.ValueType:
    return _PATHS[path]


def timings(spent: core.Timings) -> common_pb2.Timings:
    return common_pb2.Timings(
        queue_seconds=spent.queue,
        load_seconds=spent.load,
        prefill_seconds=spent.prefill,
        decode_seconds=spent.decode,
    )


def method_cost(cost: MethodCost) -> adapters_pb2.MethodCost:
    return adapters_pb2.MethodCost(
        method=cost.method,
        path=serving_path(cost.path),
        batch_size=cost.batch,
        overhead_ratio=cost.ratio,
        step_seconds=cost.step_seconds,
        adapters=cost.adapters,
        made_up=cost.made_up,
    )


def adapter(info: AdapterInfo) -> adapters_pb2.Adapter:
    return adapters_pb2.Adapter(
        name=info.ref.name,
        version=info.ref.version,
        digest=info.ref.digest,
        method=info.ref.method,
        size_bytes=info.nbytes,
        num_parameters=info.num_parameters,
        method_config=info.details,
        residency=_RESIDENCIES[info.residency],
        pinned=info.pinned,
        merged=info.merged,
        running_requests=info.running,
        error=info.error or "",
    )
