"""The figures of `hotswap bench --shape` as a table and a few sentences."""

from __future__ import annotations

from typing import Any

from hotswap_server.bench.gpu_engine import CONTEXT
from hotswap_server.bench.quantized import KIND

_ABOUT = (
    f"Decode steps, and with “x {CONTEXT}” prompts of so many tokens; adapters are distinct ones. LoRAs are "
    "on q and v, or on all linear layers; IA³ scales k, v and down's input; bottlenecks are after both "
    "blocks; mixed are 12 requests of the base, 8 LoRAs on all linear layers, 8 bottlenecks and 4 prefixes. "
    "The floor is to read weights, adapters, keys and values once."
)


def print_gpu(console: Any, figures: dict[str, Any]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    console.print(
        f"{figures['device']}, {figures['shape']} of random weights, {figures['dtype']}, {CONTEXT} tokens of "
        f"context; a copy moves {figures['bandwidth'] / 1e12:.2f} TB/s, weights are "
        f"{figures['weight_bytes'] / 1e9:.1f} GB"
    )
    table = Table(box=SIMPLE_HEAD, padding=0)
    table.add_column("step", no_wrap=True)
    for heading in ("batch", "adapters", "ms", "spread", "over base", "floor", "x floor"):
        table.add_column(heading, justify="right", no_wrap=True)
    quantized, before = figures["quantized"], None
    for steps in (figures["steps"], quantized.get("steps", ())):
        plain = {step["batch"]: step["ms"] for step in steps if step["case"].startswith("base")}
        for step in steps:
            floor = step["floor_ms"]
            prompts = floor != floor
            over = step["ms"] / plain[step["batch"]] - 1 if not prompts else 0.0
            table.add_row(
                step["case"] if step["case"] != before else "",
                f"{step['batch']} x {CONTEXT}" if prompts else str(step["batch"]),
                str(step["adapters"] or ""),
                f"{step['ms']:.2f}",
                f"{step['spread']:.2f}",
                f"{over:+.1%}" if step["adapters"] and not prompts else "",
                "" if prompts else f"{floor:.2f}",
                "" if prompts else f"{step['ms'] / floor:.2f}",
            )
            before = step["case"]
    console.print(table)
    console.print(_ABOUT)
    if "missing" in quantized:
        console.print(f"no steps over a base in {KIND}: {quantized['missing']}")
    else:
        console.print(f"weights in {KIND} are {quantized['weight_bytes'] / 1e9:.1f} GB")
    engine, swaps = figures["engine"], figures["swaps"]
    console.print(
        f"whole engine, {engine['requests']} requests: {engine['step_ms']:.2f} ms between tokens, median, of "
        f"which the device computes {engine['device_ms']:.2f}; {engine['waiting_step_ms']:.2f} if no step is "
        f"launched ahead, {engine['merged_step_ms']:.2f} with a LoRA merged; graphs recorded in "
        f"{engine['seconds_to_record']:.1f} s, first answers {figures['seconds_to_first_answer']:.1f} s "
        "after the start"
    )
    console.print(
        f"first token beside {engine['requests'] - 1} others that decode: {engine['ttft_ms']:.1f} ms, "
        f"{engine['ttft_swapped_ms']:.1f} if the LoRA lies in host memory only"
    )
    shown = ", ".join(
        f"{swaps[name]:.1f} ms {title}"
        for name, title in (
            ("from_host_ms", "from host memory"),
            ("from_loose_host_ms", "from host memory that is not pinned"),
            ("from_file_ms", "from a file"),
        )
        if name in swaps
    )
    console.print(f"a LoRA of {swaps['megabytes']:.0f} MB into its slot: {shown}")
