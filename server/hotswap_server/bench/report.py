"""The figures of a benchmark, as numbers and as a table."""

from __future__ import annotations

import statistics
from typing import Any

from hotswap_server.bench.workload import Case, Round, Run, Shape, percentiles


def summarise(cases: list[Case], rounds: list[Round]) -> list[dict[str, Any]]:
    """Medians over the rounds, by case. Ratios are of runs of one round, which share the noise.

    `agreement` is the share of requests with the same tokens on both sides; `of_base` the throughput as a
    share of the engine's own without adapters, at the same number of requests.
    """
    bases = {case.requests: index for index, case in enumerate(cases) if not case.adapters}
    figures = []
    for index, case in enumerate(cases):
        runs = [pairs[index] for pairs in rounds]
        same = sum(a == b for mine, other in runs for a, b in zip(mine.tokens, other.tokens, strict=True))
        plain = bases[case.requests]
        figures.append(
            {
                "case": case.name,
                "adapters": case.adapters,
                "requests": case.requests,
                "hotswap": _side([mine for mine, _ in runs]),
                "reference": {
                    "name": "PEFT adapter_names" if case.adapters else "transformers generate",
                    **_side([other for _, other in runs]),
                },
                "ratio": statistics.median(mine.throughput / other.throughput for mine, other in runs),
                "of_base": statistics.median(
                    pairs[index][0].throughput / pairs[plain][0].throughput for pairs in rounds
                ),
                "agreement": same / (len(runs) * case.requests),
            }
        )
    return figures


def print_report(
    console: Any, figures: list[dict[str, Any]], *, kernels: str, threads: int, shape: Shape
) -> None:
    """A row per side and case, with their ratio; then each case against the base on the same engine."""
    from rich.table import Table

    table = Table(
        title=f"{shape.prompt_tokens} prompt and {shape.new_tokens} new tokens each, "
        f"LoRA rank {shape.rank}, {kernels} kernels, {threads} threads"
    )
    table.add_column("case")
    for heading in ("side", "tok/s", "ratio", "TTFT p50", "p95", "ITL p50", "p95", "same tokens"):
        table.add_column(heading, justify="left" if heading == "side" else "right")
    for entry in figures:
        for side, extra in (("hotswap", True), ("reference", False)):
            values = entry[side]
            table.add_row(
                entry["case"] if extra else "",
                "hotswap" if extra else values["name"],
                f"{values['throughput']:.1f}",
                f"{entry['ratio']:.2f}" if extra else "1.00",
                *(f"{values[key] * 1e3:.0f} ms" for key in ("ttft_p50", "ttft_p95", "itl_p50", "itl_p95")),
                f"{entry['agreement']:.0%}" if extra else "",
                end_section=not extra,
            )
    console.print(table)
    for entry in figures:
        if entry["adapters"]:
            console.print(f"{entry['case']}: {entry['of_base']:.1%} of the engine's own base throughput")


def _side(runs: list[Run]) -> dict[str, float]:
    ttft = percentiles([value for run in runs for value in run.ttft])
    itl = percentiles([value for run in runs for value in run.inter_token])
    return {
        "throughput": statistics.median(run.throughput for run in runs),
        "ttft_p50": ttft[0],
        "ttft_p95": ttft[1],
        "itl_p50": itl[0],
        "itl_p95": itl[1],
    }
