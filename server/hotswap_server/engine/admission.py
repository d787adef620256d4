"""A request's last check before it is queued."""

from __future__ import annotations

from typing import Any

from hotswap_server.core import GenerateRequest, ScoreRequest
from hotswap_server.engine.detokenizer import Detokenizer
from hotswap_server.engine.sequence import EventSink, Sequence
from hotswap_server.errors import InvalidRequestError


def fit_prefix(sequence: Sequence, max_context: int) -> None:
    """Cut the output to the room that the adapter's prefix leaves, which is known once it is loaded.

    Raises:
        InvalidRequestError: prefix and prompt leave none.
    """
    length, prefix = sequence.num_prompt_tokens, sequence.num_prefix_tokens
    longest = max_context - prefix - (0 if sequence.is_score else 1)
    if length > longest:
        raise InvalidRequestError(
            "input",
            f"has {length} tokens; with the {prefix} of {sequence.request.adapter}'s prefix this server "
            f"takes {max(longest, 0)} at most. Shorten it",
        )
    sequence.max_new_tokens = min(sequence.max_new_tokens, max_context - prefix - length)


def admit(
    request: GenerateRequest | ScoreRequest,
    sink: EventSink,
    tokenizer: Any,
    *,
    max_context: int,
    vocab_size: int,
) -> Sequence:
    """The sequence of a request. Its output is cut where prompt and output reach `max_context` tokens.

    Raises:
        InvalidRequestError: the input is empty, too long, or holds a token outside the vocabulary; or a score
            has nothing to score.
    """
    length = len(request.prompt_ids)
    if length == 0:
        raise InvalidRequestError("input", "must hold at least one token")
    longest = max_context - (0 if isinstance(request, ScoreRequest) else 1)
    if length > longest:
        raise InvalidRequestError(
            "input", f"has {length} tokens; this server takes {longest} at most. Shorten it"
        )
    bad = next((token for token in request.prompt_ids if not 0 <= token < vocab_size), None)
    if bad is not None:
        raise InvalidRequestError("input.token_ids", f"{bad} is outside the vocabulary of {vocab_size}")
    if isinstance(request, ScoreRequest):
        if not 1 <= request.score_from < length:
            raise InvalidRequestError(
                "text", "must hold a token to score after the context or the first token"
            )
        return Sequence(request, sink, max_new_tokens=0)
    room = max_context - length
    asked = request.sampling.max_new_tokens
    return Sequence(
        request,
        sink,
        max_new_tokens=room if asked is None else min(asked, room),
        detokenizer=Detokenizer(tokenizer, request.sampling.stop),
    )
