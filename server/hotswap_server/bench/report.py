"""The figures of a benchmark, as numbers and as a table."""

from __future__ import annotations

import statistics
from typing import Any

from hotswap_server.bench.workload import Case, Run, Shape, percentiles


def summarise(case: Case, runs: list[tuple[Run, Run]]) -> dict[str, Any]:
    """Medians over the runs; `ratio` is that of the runs' ratios, since the two of a run share its noise.

    `agreement` is the share of requests whose tokens are the same on both sides.
    """
    ours, theirs = [pair[0] for pair in runs], [pair[1] for pair in runs]
    same = sum(a == b for mine, other in runs for a, b in zip(mine.tokens, other.tokens, strict=True))
    return {
        "case": case.name,
        "adapters": case.adapters,
        "requests": case.requests,
        "hotswap": _side(ours),
        "reference": {
            "name": "PEFT adapter_names" if case.adapters else "transformers generate",
            **_side(theirs),
        },
        "ratio": statistics.median(mine.throughput / other.throughput for mine, other in runs),
        "agreement": same / (len(runs) * case.requests),
    }


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
    largest = max((entry for entry in figures if not entry["adapters"]), key=lambda entry: entry["requests"])
    for entry in figures:
        if entry["adapters"] and entry["requests"] == largest["requests"]:
            share = entry["hotswap"]["throughput"] / largest["hotswap"]["throughput"]
            console.print(f"{entry['case']}: {share:.1%} of the engine's own base throughput")


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
