"""The report's tables as text, for every form that it takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hotswap_client.cli.compare import units
from hotswap_client.cli.compare.latency import Latency
from hotswap_client.cli.compare.results import Comparison, MethodResult

NOTHING = "\N{EN DASH}"


@dataclass(frozen=True, slots=True)
class Table:
    """`rows` have as many cells as `headings`; the first of each is the row's own heading."""

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str


def all_tables(comparison: Comparison) -> tuple[Table, ...]:
    return overview(comparison), latencies(comparison), knowledge(comparison), settings(comparison)


def overview(comparison: Comparison) -> Table:
    """The lesson's table, measured."""
    sizes = tuple(comparison.base_latency)
    headings = (
        "method",
        "right answers",
        *(f"latency at {size}" for size in sizes),
        "tokens/s",
        "other text",
        "knowledge",
        "trainable",
        "of all",
        "training",
        "peak memory",
        "checkpoint",
    )
    base = (
        "base",
        units.share(comparison.base.accuracy),
        *(NOTHING for _ in sizes),
        _throughput(comparison.base_latency),
        *(NOTHING,) * 6,
        units.bytes_of(comparison.base_bytes),
    )
    rows = [base]
    for result in comparison.methods:
        trained = result.trained
        rows.append(
            (
                result.name,
                units.share(result.evaluation.accuracy),
                *_overheads(result.latency),
                _throughput(result.latency),
                units.signed(comparison.text_change(result)),
                units.signed_share(comparison.knowledge_change(result)),
                f"{trained.trainable:,}",
                units.percent(trained.percent),
                units.duration(trained.seconds),
                units.bytes_of(trained.memory),
                units.bytes_of(trained.checkpoint_bytes),
            )
        )
        if result.merged is not None:
            measured = (*_overheads(result.merged), _throughput(result.merged))
            rows.append((f"{result.name}, merged", NOTHING, *measured, *(NOTHING,) * 7))
    note = (
        "Latency is time between tokens over the base's, with that many requests at once; tokens/s is of "
        f"{sizes[-1]} requests together. Other text is the change of log-likelihood in nats a token, "
        "knowledge that of right answers: below zero, something was forgotten. Peak memory is that of the "
        "whole training process, or of the GPU."
    )
    return Table("The methods", headings, tuple(rows), note)


def latencies(comparison: Comparison) -> Table:
    headings = (
        "method",
        "requests",
        "first token p50",
        "p95",
        "over base",
        "between tokens p50",
        "p95",
        "over base",
        "quartiles",
        "tokens/s",
    )
    rows = []
    for size in comparison.base_latency:
        rows.append(_latency("base", comparison.base_latency[size], is_base=True))
        for result in comparison.methods:
            rows.append(_latency(result.name, result.latency[size]))
            if result.merged is not None:
                rows.append(_latency(f"{result.name}, merged", result.merged[size]))
    note = (
        "Times are in milliseconds, as a client sees them. Over base is the median of the rounds' ratios of "
        "medians, with the quartiles of those between tokens: the machine's speed drifts, ratios within a "
        "round hardly do."
    )
    if any(result.is_base for result in comparison.methods):
        note += " full is a base of its own, in a second server; the others share one."
    return Table("Latency", headings, tuple(rows), note)


def knowledge(comparison: Comparison) -> Table:
    headings = (
        "method",
        "right answers",
        "log-likelihood of right ones",
        "of other text",
        "change",
        "knowledge",
        "change",
    )

    def row(result: MethodResult | None) -> tuple[str, ...]:
        found = comparison.base if result is None else result.evaluation
        text = NOTHING if result is None else units.signed(comparison.text_change(result))
        known = NOTHING if result is None else units.signed_share(comparison.knowledge_change(result))
        return (
            "base" if result is None else result.name,
            f"{found.right}/{found.num_questions}",
            units.signed(found.answer_logprob),
            units.signed(found.text_logprob),
            text,
            f"{found.knowledge_right}/{found.num_items}",
            known,
        )

    note = (
        "Log-likelihoods are in nats a token. Other text and knowledge are the shipped general text and "
        "questions, which no method was trained on."
    )
    rows = tuple(row(result) for result in (None, *comparison.methods))
    return Table("What was learnt and what was forgotten", headings, rows, note)


def settings(comparison: Comparison) -> Table:
    rows = []
    for result in comparison.methods:
        shown = {key: value for key, value in result.trained.settings.items() if key != "method"}
        losses = result.trained.losses
        rows.append(
            (
                result.name,
                ", ".join(f"{key.replace('_', '-')} {value}" for key, value in shown.items()),
                str(result.trained.steps),
                f"{losses[0][1]:.3f} \N{RIGHTWARDS ARROW} {losses[-1][1]:.3f}",
                f"{result.trained.adapter}@{result.trained.version}",
            )
        )
    return Table(
        "How each was trained",
        ("method", "options of hotswap train", "steps", "loss", "in the store"),
        tuple(rows),
        "All saw the same examples in batches of the same size; each has a learning rate of its own.",
    )


def _overheads(latency: Mapping[int, Latency]) -> tuple[str, ...]:
    return tuple(units.signed_share(entry.between_tokens_overhead.median) for entry in latency.values())


def _throughput(latency: Mapping[int, Latency]) -> str:
    *_, last = latency.values()
    return f"{last.tokens_per_second:.0f}"


def _latency(name: str, latency: Latency, *, is_base: bool = False) -> tuple[str, ...]:
    first, between = latency.first_token, latency.between_tokens
    spread = latency.between_tokens_overhead
    quartiles = f"{units.signed_share(spread.low)} to {units.signed_share(spread.high)}"
    return (
        name,
        str(latency.batch_size),
        units.milliseconds(first.p50),
        units.milliseconds(first.p95),
        NOTHING if is_base else units.signed_share(latency.first_token_overhead.median),
        units.milliseconds(between.p50),
        units.milliseconds(between.p95),
        NOTHING if is_base else units.signed_share(spread.median),
        NOTHING if is_base else quartiles,
        f"{latency.tokens_per_second:.0f}",
    )
