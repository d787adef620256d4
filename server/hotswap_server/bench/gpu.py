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
from hotswap_server.bench.quantized import measure_quantized
from hotswap_server.bench.shapes import random_lora, random_model
from hotswap_server.bench.steps import (
    StepBench,
    fill_bottlenecks,
    fill_ia3,
    fill_loras,
    measure_grid,
    place_prefixes,
)
from hotswap_server.bench.workload import ALL_LINEAR, QUERY_VALUE
from hotswap_server.engine.base import BaseModel, prepare_base
from hotswap_server.engine.compiling import compile_layers
from hotswap_server.kernels import select_kernels

_SLOTS, _BOTTLENECK, _PREFIX = 32, 64, 20


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
    for targets, where in ((QUERY_VALUE, "q,v"), (ALL_LINEAR, "all")):
        tell(f"LoRAs on {where}")
        nbytes = fill_loras(base, _SLOTS, RANK, targets)
        measure_grid(bench, f"LoRA r={RANK} {where}", "lora", nbytes)
        if targets is ALL_LINEAR:
            bench.prefill("prompts", 16)
            bench.prefill(f"prompts, LoRA r={RANK}", 16, [("lora", slot) for slot in range(16)])
        base.detach_adapters()
    tell("IA³ adapters")
    measure_grid(bench, "IA³", "ia3", fill_ia3(base, _SLOTS))
    base.detach_adapters()
    tell("bottleneck adapters and prefixes")
    bottleneck_bytes = fill_bottlenecks(base, _SLOTS, _BOTTLENECK)
    measure_grid(bench, f"bottleneck-{_BOTTLENECK}", "bottleneck", bottleneck_bytes)
    place_prefixes(base, _SLOTS, _PREFIX)
    measure_grid(bench, f"prefix-{_PREFIX}", "prefix", 0)  # which are keys and values
    lora_bytes = fill_loras(base, 8, RANK, ALL_LINEAR)
    mixed: list[tuple[str, int] | None] = [None] * 12
    mixed += [(method, slot) for method in ("lora", "bottleneck") for slot in range(8)]
    mixed += [("prefix", slot) for slot in range(4)]
    extra = 8 * (lora_bytes + bottleneck_bytes)
    bench.decode("mixed", 32, mixed, extra)
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
