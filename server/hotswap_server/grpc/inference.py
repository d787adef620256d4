"""InferenceService: requests to the engine, its events to responses."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any, Final

from hotswap.names import AdapterReference
from hotswap.v1 import inference_pb2, inference_pb2_grpc

from hotswap_server.core import (
    BASE_METHOD,
    MAX_TOP_LOGPROBS,
    AdapterRef,
    Delta,
    Finished,
    GenerateRequest,
    ScoreRequest,
)
from hotswap_server.engine.service import EngineService
from hotswap_server.errors import EngineError, InvalidRequestError
from hotswap_server.grpc import convert
from hotswap_server.grpc.encoding import InputEncoder
from hotswap_server.grpc.interceptors import current_call
from hotswap_server.grpc.store_calls import StoreCalls
from hotswap_server.metrics import method_label

MAX_ROUTING_KEY_LENGTH: Final = 256

AnyGenerateRequest = inference_pb2.GenerateRequest | inference_pb2.GenerateStreamRequest


class InferenceServicer(inference_pb2_grpc.InferenceServiceServicer):
    """Leaving a call, for whatever reason, leaves the engine's iterator, which cancels the request there."""

    def __init__(self, engine: EngineService, encoder: InputEncoder, store: StoreCalls) -> None:
        self._engine = engine
        self._encoder = encoder
        self._store = store

    async def Generate(
        self, request: inference_pb2.GenerateRequest, context: Any
    ) -> inference_pb2.GenerateResponse:
        prepared = await self._prepare(request, context)
        deltas: list[Delta] = []
        async with aclosing(self._events(prepared)) as events:
            async for event in events:
                if isinstance(event, Delta):
                    deltas.append(event)
                else:
                    response = convert.generation(deltas)
                    response.completion.CopyFrom(convert.completion(event, prepared.adapter))
                    return response
        raise EngineError("the engine ended the request without a result")

    async def GenerateStream(
        self, request: inference_pb2.GenerateStreamRequest, context: Any
    ) -> AsyncIterator[inference_pb2.GenerateStreamResponse]:
        prepared = await self._prepare(request, context)
        async with aclosing(self._events(prepared)) as events:
            async for event in events:
                if isinstance(event, Delta):
                    yield inference_pb2.GenerateStreamResponse(delta=convert.delta(event))
                else:
                    completion = convert.completion(event, prepared.adapter)
                    yield inference_pb2.GenerateStreamResponse(completion=completion)
                    return
        raise EngineError("the engine ended the request without a result")

    async def Score(self, request: inference_pb2.ScoreRequest, context: Any) -> inference_pb2.ScoreResponse:
        reference = _referred(request)
        if not 0 <= request.top_logprobs <= MAX_TOP_LOGPROBS:
            raise InvalidRequestError(
                "top_logprobs", f"must be between 0 and {MAX_TOP_LOGPROBS}, got {request.top_logprobs}"
            )
        before: tuple[int, ...] = ()
        if request.HasField("context"):
            before = await self._encoder.encode("context", request.context)
        target = request.WhichOneof("target")
        if target == "text":
            scored = await self._encoder.text("text", request.text, continuation=bool(before))
        elif target == "token_ids":
            scored = self._encoder.ids("token_ids", request.token_ids)
        else:
            raise InvalidRequestError("target", "is required; set text or token_ids")
        id_ = uuid.uuid4().hex
        adapter, seconds = await self._resolve(reference, request.routing_key or id_)
        current_call().spend(len(before) + len(scored))
        result = await self._engine.score(
            ScoreRequest(
                id=id_,
                prompt_ids=before + scored,
                score_from=len(before) or 1,
                top_logprobs=request.top_logprobs,
                adapter=adapter,
                resolve_seconds=seconds,
                tenant=current_call().principal.name,
                deadline=_deadline(context),
                trace=current_call().trace,
            )
        )
        current_call().facts |= {"path": result.path.value, "prompt_tokens": result.num_prompt_tokens}
        return convert.score(result, adapter)

    async def Tokenize(
        self, request: inference_pb2.TokenizeRequest, context: Any
    ) -> inference_pb2.TokenizeResponse:
        current_call().method = method_label(BASE_METHOD)
        ids = await self._encoder.encode("input", request.input)
        return inference_pb2.TokenizeResponse(token_ids=ids, count=len(ids))

    async def _prepare(self, request: AnyGenerateRequest, context: Any) -> GenerateRequest:
        reference = _referred(request)
        sampling = convert.sampling_params(request.sampling, self._encoder.vocab_size)
        prompt = await self._encoder.encode("input", request.input)
        id_ = uuid.uuid4().hex
        adapter, seconds = await self._resolve(reference, request.routing_key or id_)
        return GenerateRequest(
            id_,
            prompt,
            sampling,
            adapter,
            resolve_seconds=seconds,
            tenant=current_call().principal.name,
            deadline=_deadline(context),
            trace=current_call().trace,
        )

    async def _resolve(self, reference: AdapterReference | None, key: str) -> tuple[AdapterRef | None, float]:
        """The version to use, and the seconds that the store took, which may have to read the content.

        `key` is what a canary's share is chosen by.
        """
        if reference is None:
            return None, 0.0
        began = time.perf_counter()
        ref = await self._store.run(lambda: self._engine.adapters.resolve(str(reference), None, key=key))
        call = current_call()
        call.method = method_label(ref.method)
        call.facts["version"] = ref.version
        call.digest = ref.digest
        return ref, time.perf_counter() - began

    async def _events(self, request: GenerateRequest) -> AsyncGenerator[Delta | Finished, None]:
        call = current_call()
        facts, spend = call.facts, call.spend
        spend(len(request.prompt_ids))
        async with aclosing(self._engine.generate(request)) as events:  # type: ignore[type-var]
            async for event in events:
                if isinstance(event, Delta):
                    spend(len(event.token_ids))
                elif isinstance(event, Finished):
                    facts |= {
                        "path": event.path.value,
                        "finish_reason": event.finish_reason.value,
                        "prompt_tokens": event.num_prompt_tokens,
                        "generated_tokens": event.num_generated_tokens,
                    }
                yield event


def _deadline(context: Any) -> float | None:
    """When the caller stops waiting, on the clock of `time.perf_counter`."""
    remaining = context.time_remaining()
    return None if remaining is None else time.perf_counter() + float(remaining)


def _referred(request: AnyGenerateRequest | inference_pb2.ScoreRequest) -> AdapterReference | None:
    """The adapter that a request wants; None for the base model."""
    version = request.version if request.HasField("version") else None
    if len(request.routing_key) > MAX_ROUTING_KEY_LENGTH:
        raise InvalidRequestError(
            "routing_key", f"has at most {MAX_ROUTING_KEY_LENGTH} characters, got {len(request.routing_key)}"
        )
    call = current_call()
    if request.adapter:
        reference = convert.adapter_reference("adapter", request.adapter, version)
        call.facts["adapter"] = str(reference.name)
        if reference.alias is not None:
            call.facts["alias"] = reference.alias
        return reference
    if version is not None:
        raise InvalidRequestError("version", "must be absent for the base model; name the adapter too")
    call.method = method_label(BASE_METHOD)
    return None
