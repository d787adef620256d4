"""`hotswap bench --shape llama-8b`: decode steps, prompts and swaps beside what memory allows."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from hotswap_server.adapters.method import BankOptions
from hotswap_server.adapters.methods.lora.adapter import LoraAdapter
from hotswap_server.adapters.methods.lora.bank import LoraBank
from hotswap_server.adapters.transfer import beside_steps, packed
from hotswap_server.bench.gpu_engine import CONTEXT, RANK, Tell, measure_engine
from hotswap_server.bench.quantized import KIND, measure_quantized
from hotswap_server.bench.shapes import random_lora, random_model
from hotswap_server.bench.steps import (
    StepBench,
    fill_bottlenecks,
    fill_loras,
    place_prefixes,
)
from hotswap_server.bench.workload import ALL_LINEAR, QUERY_VALUE
from hotswap_server.engine.base import BaseModel, prepare_base
from hotswap_server.engine.compiling import compile_layers
from hotswap_server.kernels import select_kernels

_BOTTLENECK, _PREFIX = 64, 20


def measure_gpu(shape: str, device: torch.device, dtype: torch.dtype, *, eager: bool, tell: Tell) -> Any:
    """The figures of one base of random weights, an entry of SHAPES; `tell` gets what is being measured."""
    tell("making the base")
    began = time.perf_counter()
    model = random_model(shape, device=device, dtype=dtype)
    base = prepare_base(model, kernels=select_kernels(device, dtype))
    if not eager and base.state.kernels.can_be_recorded:
        compile_layers(base)
    made = time.perf_counter() - began
    figures: dict[str, Any] = {
        "shape": shape,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "versions": {"torch": torch.__version__},
        "seconds_to_make_base": made,
    }
    figures["engine"] = measure_engine(
        base, tell, lambda: figures.update(seconds_to_first_answer=time.perf_counter() - began)
    )
    figures |= _measure_steps(base, tell)
    figures["swaps"] = _measure_swaps(base, tell)
    figures["quantized"] = measure_quantized(
        shape, device, dtype, context=CONTEXT, rank=RANK, eager=eager, tell=tell
    )
    return figures


def _measure_steps(base: BaseModel, tell: Tell) -> dict[str, Any]:
    bench = StepBench(base, CONTEXT, 64)
    tell("base")
    for batch in (1, 8, 32, 64):
        bench.decode("base", batch)
    for title, targets in (("LoRA r=16 on q,v", QUERY_VALUE), ("LoRA r=16 on all linears", ALL_LINEAR)):
        tell(title)
        nbytes = fill_loras(base, 32, RANK, targets)
        for batch, adapters in ((1, 1), (8, 1), (8, 8), (32, 1), (32, 32), (64, 1), (64, 32)):
            own: list[tuple[str, int] | None] = [("lora", slot) for slot in range(adapters)]
            bench.decode(f"{title}, {adapters} distinct", batch, own, nbytes * adapters)
        if targets is ALL_LINEAR:
            bench.prefill("prompts, base", 16)
            bench.prefill("prompts, 16 LoRAs on all linears", 16, [("lora", slot) for slot in range(16)])
        base.detach_adapters()
    tell("bottleneck adapters and prefixes")
    nbytes = fill_bottlenecks(base, 32, _BOTTLENECK)
    for batch, adapters in ((1, 1), (8, 8), (32, 1), (32, 32)):
        own = [("bottleneck", slot) for slot in range(adapters)]
        bench.decode(f"bottleneck-{_BOTTLENECK}, {adapters} distinct", batch, own, nbytes * adapters)
    place_prefixes(base, 4, _PREFIX)
    for batch in (1, 32):
        bench.decode(f"prefix-{_PREFIX}", batch, [("prefix", slot) for slot in range(4)])
    fill_loras(base, 8, RANK, ALL_LINEAR)
    mixed: list[tuple[str, int] | None] = [None] * 12
    mixed += [(method, slot) for method in ("lora", "bottleneck") for slot in range(8)]
    mixed += [("prefix", slot) for slot in range(4)]
    bench.decode("12 base, 8 LoRAs, 8 bottlenecks, 4 prefixes", 32, mixed)
    base.detach_adapters()
    return {
        "bandwidth": bench.bandwidth,
        "weight_bytes": bench.weight_bytes,
        "context": CONTEXT,
        "steps": [asdict(step) for step in bench.times],
    }


def _measure_swaps(base: BaseModel, tell: Tell) -> dict[str, float]:
    """Milliseconds until a LoRA on all linears is in its slot: from host memory or from a file."""
    from safetensors.torch import load_file, save_file

    tell("swaps")
    bank = LoraBank(base, BankOptions(num_slots=2, max_lora_rank=RANK))
    adapter = random_lora(base, RANK, ALL_LINEAR)
    bank.put(0, adapter)
    host = _mapped(adapter, lambda tensors: [tensor.cpu() for tensor in tensors])
    figures = {"from_loose_host_ms": _put_ms(base, bank, lambda: host)}
    if base.device.type == "cuda":  # as the loader leaves it
        ready = _mapped(host, packed)
        figures["from_host_ms"] = _put_ms(base, bank, lambda: ready)
    with tempfile.TemporaryDirectory(prefix="hotswap-bench-") as directory:
        path = Path(directory) / "adapter.safetensors"
        save_file({f"{n}.{i}": t for n, pair in host.weights.items() for i, t in enumerate(pair)}, path)

        def read() -> LoraAdapter:
            tensors = load_file(path)
            weights = {name: (tensors[f"{name}.0"], tensors[f"{name}.1"]) for name in host.weights}
            return LoraAdapter(weights, {}, {}, host.nbytes, 0, {})

        figures["from_file_ms"] = _put_ms(base, bank, read)
    figures["megabytes"] = adapter.nbytes / 1e6
    base.detach_adapters()
    return figures


def _put_ms(base: BaseModel, bank: LoraBank, make: Callable[[], LoraAdapter]) -> float:
    times = []
    for _ in range(4):
        began = time.perf_counter()
        with beside_steps(base.device):
            bank.put(1, make())
        times.append((time.perf_counter() - began) * 1e3)
    return min(times)


def _mapped(adapter: LoraAdapter, change: Callable[[list[torch.Tensor]], list[torch.Tensor]]) -> LoraAdapter:
    halves = iter(change([tensor for pair in adapter.weights.values() for tensor in pair]))
    weights = dict(zip(adapter.weights, zip(halves, halves, strict=True), strict=True))
    return LoraAdapter(weights, {}, {}, adapter.nbytes, 0, {})


def print_gpu(console: Any, figures: dict[str, Any]) -> None:
    from rich.table import Table

    console.print(
        f"{figures['device']}, {figures['shape']} of random weights, {figures['dtype']}, {CONTEXT} tokens of "
        f"context; a copy moves {figures['bandwidth'] / 1e12:.2f} TB/s, weights are "
        f"{figures['weight_bytes'] / 1e9:.1f} GB"
    )
    table = Table()
    table.add_column("step")
    for heading in ("batch", "ms", "spread", "of base", "floor", "over floor"):
        table.add_column(heading, justify="right")
    quantized = figures["quantized"]
    steps = [*figures["steps"], *quantized.get("steps", ())]
    plain = {step["batch"]: step["ms"] for step in steps if step["case"] == "base"}
    for step in steps:
        floor = step["floor_ms"]
        prompts = floor != floor
        table.add_row(
            step["case"],
            f"{step['batch']} x {CONTEXT}" if prompts else str(step["batch"]),
            f"{step['ms']:.2f}",
            f"{step['spread']:.2f}",
            "" if prompts else f"{step['ms'] / plain[step['batch']] - 1:+.1%}",
            "" if prompts else f"{floor:.2f}",
            "" if prompts else f"{step['ms'] / floor:.2f}",
        )
    console.print(table)
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
