"""Choosing tokens: rows of one batch, each by its own parameters and independent of the others."""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass

import torch

from hotswap_server.core import SamplingParams, TokenLogprob

# Nearly every nucleus lies within this many candidates, and finding them is much cheaper than a full sort.
_CANDIDATES = 1024
_MIN_TEMPERATURE = 1e-30  # what float32 can divide by; the best token has all the probability long before
_MASK = 2**64 - 1


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """One row of logits: `token_ids` are the prompt and what was generated, `index` counts the latter."""

    params: SamplingParams
    seed: int
    index: int
    token_ids: list[int]


@dataclass(frozen=True, slots=True)
class Sampled:
    """The token of one row, and its log-probabilities where they were asked for."""

    token_id: int
    logprob: TokenLogprob | None


def sample(logits: torch.Tensor, rows: Rows[SamplingRow]) -> list[Sampled | None]:
    """A token for each row of `logits` [rows, vocabulary] float32, which may be changed in place.

    None stands where a row holds a NaN or no finite value.
    """
    if not rows:
        return []
    wanted = [index for index, row in enumerate(rows) if row.params.logprobs is not None]
    logprobs = logits[wanted].log_softmax(dim=-1) if wanted else None
    _penalise_repetition(logits, rows)
    best, greedy = logits.max(dim=-1)
    valid: list[bool] = best.isfinite().tolist()
    tokens: list[int] = greedy.tolist()
    drawn = [index for index, row in enumerate(rows) if not row.params.greedy and valid[index]]
    filtered = [index for index in drawn if _has_filter(rows[index].params)]
    for indices, draw in (([i for i in drawn if i not in filtered], _draw), (filtered, _draw_filtered)):
        if indices:
            params = [rows[index].params for index in indices]
            temperature = torch.tensor(
                [max(p.temperature, _MIN_TEMPERATURE) for p in params], device=logits.device
            )
            noise = [uniform(rows[index].seed, rows[index].index) for index in indices]
            uniforms = torch.tensor(noise, dtype=torch.float64, device=logits.device)
            # The largest becomes 0, so that a small temperature cannot overflow.
            scaled = (logits[indices] - best[indices, None]) / temperature[:, None]
            chosen = draw(scaled, uniforms, params)
            for index, token in zip(indices, chosen, strict=True):
                tokens[index] = token
    described = {}
    if logprobs is not None:
        for position, index in enumerate(wanted):
            described[index] = describe_logprob(
                logprobs[position], tokens[index], rows[index].params.logprobs or 0
            )
    return [
        Sampled(token, described.get(index)) if ok else None
        for index, (token, ok) in enumerate(zip(tokens, valid, strict=True))
    ]


def uniform(seed: int, index: int) -> float:
    """A number in [0, 1) that depends on the two alone: SplitMix64 (Steele et al., 2014) over a counter.

    No state has to survive a preemption, and neighbours cannot disturb it.
    """
    z = (seed * 0xD1342543DE82EF95 + (index + 1) * 0x9E3779B97F4A7C15) & _MASK
    for _ in range(2):
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
        z ^= z >> 31
    return (z >> 11) * 2.0**-53


def describe_logprob(logprobs: torch.Tensor, token_id: int, top: int) -> TokenLogprob:
    """The entry of one position from its log-probabilities [vocabulary]."""
    best: tuple[tuple[int, float], ...] = ()
    if top:
        values, ids = logprobs.topk(min(top, logprobs.shape[-1]))
        best = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return TokenLogprob(token_id, float(logprobs[token_id]), best)


def _penalise_repetition(logits: torch.Tensor, rows: Rows[SamplingRow]) -> None:
    """Divide positive and multiply negative logits of tokens already seen (Keskar et al., "CTRL", 2019)."""
    for index, row in enumerate(rows):
        penalty = row.params.repetition_penalty
        if penalty != 1.0:
            seen = torch.tensor(sorted(set(row.token_ids)), device=logits.device)
            values = logits[index, seen]
            logits[index, seen] = torch.where(values > 0, values / penalty, values * penalty)


def _has_filter(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1 or params.min_p > 0


def _draw(scaled: torch.Tensor, uniforms: torch.Tensor, params: Rows[SamplingParams]) -> list[int]:
    """Inverse transform sampling over the whole vocabulary."""
    return _invert(scaled.softmax(dim=-1), uniforms)


def _draw_filtered(scaled: torch.Tensor, uniforms: torch.Tensor, params: Rows[SamplingParams]) -> list[int]:
    """Top-k, then top-p, then min-p, over candidates in order of probability."""
    total = scaled.logsumexp(dim=-1, keepdim=True)
    count = min(_CANDIDATES, scaled.shape[-1])
    values, ids = scaled.topk(count, dim=-1)
    tokens: list[int] = []
    for row, row_params in enumerate(params):
        candidates, candidate_ids = values[row], ids[row]
        if count < scaled.shape[-1] and not _decided_within(candidates, total[row], row_params):
            candidates, candidate_ids = scaled[row].sort(descending=True, stable=True)
        probs = _filter(candidates, total[row], row_params)
        [position] = _invert(probs[None], uniforms[row : row + 1])
        tokens.append(int(candidate_ids[position]))
    return tokens


def _decided_within(candidates: torch.Tensor, total: torch.Tensor, params: SamplingParams) -> bool:
    """Whether no token beyond `candidates` can pass the filters."""
    if params.top_k > 0:
        # A larger top-k needs all its tokens, since the nucleus is a share of their sum.
        return params.top_k <= candidates.shape[0]
    probs = (candidates - total).exp()
    if params.min_p > 0 and bool(probs[-1] < params.min_p * probs[0]):
        return True
    return params.top_p < 1 and bool(probs.sum() >= params.top_p)


def _filter(candidates: torch.Tensor, total: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Probabilities of `candidates` (descending logits) with those filtered out at zero; not normalised."""
    probs = (candidates - total).exp()
    if params.top_k > 0:
        probs = probs[: params.top_k]
        probs = probs / probs.sum()
    if params.top_p < 1:
        before = probs.cumsum(dim=-1) - probs
        probs = probs.where(before < params.top_p, 0.0)
    if params.min_p > 0:
        probs = probs.where(probs >= params.min_p * probs[0], 0.0)
    return probs


def _invert(probs: torch.Tensor, uniforms: torch.Tensor) -> list[int]:
    """The first index whose cumulative probability exceeds u times the total; `probs` [rows, n]."""
    cumulative = probs.double().cumsum(dim=-1)
    targets = uniforms[:, None] * cumulative[:, -1:]
    chosen = torch.searchsorted(cumulative, targets, right=True).squeeze(-1)
    # Rounding may reach the total itself: fall back on the last token that has any probability.
    last = (probs > 0).int().cumsum(dim=-1).argmax(dim=-1)
    indices: list[int] = torch.minimum(chosen, last).tolist()
    return indices
