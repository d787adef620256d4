"""What real training steps take, to hold plans to: run as a program, in a process of its own.

On a GPU memory is what the CUDA allocator gave out. On a CPU what is held between steps is the resident set
of the process, and the peak what torch's profiler saw allocated: the resident set's own peak, `resident`, has
the heap's gaps and the buffers of matrix libraries in it. As a program it prints JSON; by hand, on a GPU:

    PYTHONPATH=proto:trainer:tests python tests/support/measured_step.py --base llama-1b --device cuda \\
        --dtype bf16 --batch 2 --seq 2048 --methods full,lora,bottleneck,prefix
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import re
import subprocess
import sys
import tempfile
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from hotswap_trainer import methods
from hotswap_trainer.planning.base import read_config
from hotswap_trainer.planning.options import PlanOptions
from hotswap_trainer.planning.step import DTYPES, Step, method_options_of, simulate
from torch import nn
from torch.profiler import ProfilerActivity, profile

_RANK = 16


class HostMemory:
    """Resident bytes of this process beyond those at the start."""

    def __init__(self) -> None:
        self.start = 0
        self.start = self.now()

    def now(self) -> int:
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        return self._read("VmRSS") - self.start

    def peak(self) -> int:
        return self._read("VmHWM") - self.start

    def forget_peak(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")

    def _read(self, field: str) -> int:
        found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
        assert found is not None
        return int(found[1]) * 1024


class CudaMemory:
    """Bytes that the CUDA allocator gave out beyond those at the start."""

    def __init__(self) -> None:
        torch.ones(64, 64, device="cuda") @ torch.ones(64, 64, device="cuda")  # cuBLAS takes its workspace
        self.start = torch.cuda.memory_allocated()

    def now(self) -> int:
        gc.collect()
        return torch.cuda.memory_allocated() - self.start

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated() - self.start

    def forget_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats()


def measure(
    base: Path, method: str, options: PlanOptions, *, checkpointing: bool, device: str
) -> dict[str, int]:
    """Bytes of a few steps: `held`, of weights, gradients and optimizer between two steps, and `peak`."""
    compute = DTYPES[options.dtype]
    _train(_model(_warm_up(base), method, options, False, compute), options, device)
    gc.collect()
    memory: Any = CudaMemory() if device == "cuda" else HostMemory()
    model = _model(base, method, options, checkpointing, compute).to(device)
    memory.forget_peak()
    optimizer = _train(model, options, device)
    held, peak = memory.now(), memory.peak()
    if device == "cuda":
        return {"held": held, "peak": peak}
    return {"held": held, "peak": _allocated(model, options, optimizer), "resident": peak}


def _allocated(model: Any, options: PlanOptions, optimizer: torch.optim.Optimizer) -> int:
    """The most that torch's allocator has out in a step on a CPU: what is there before, and what is added."""
    optimizer.zero_grad()
    gc.collect()
    before = [*model.parameters(), *model.buffers()]
    before += [value for state in optimizer.state.values() for value in state.values()]
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            before += [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    now = most = sum(tensor.nbytes for tensor in before if isinstance(tensor, torch.Tensor))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        _train(model, options, "cpu", steps=1, optimizer=optimizer)
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def _warm_up(base: Path) -> Path:
    """A tiny model of the base's kind, whose steps load whatever code steps need."""
    return base / "tiny"


def _model(base: Path, method: str, options: PlanOptions, checkpointing: bool, compute: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    chosen = methods.available()[method]
    method_options = method_options_of(method, options, _RANK)
    model = AutoModelForCausalLM.from_pretrained(base, **chosen.base_arguments(method_options, compute))
    model.config.use_cache = False
    if checkpointing:
        model.enable_input_require_grads()
    model = chosen.attach(model, method_options)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def _train(
    model: Any,
    options: PlanOptions,
    device: str,
    steps: int = 2,
    optimizer: torch.optim.Optimizer | None = None,
) -> torch.optim.Optimizer:
    """Some steps as transformers' Trainer does them. The last one's gradients stay."""
    model = model.to(device)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer or _optimizer(trained, options.optimizer)
    ids = torch.randint(500, (options.batch, options.seq), device=device)
    kept = torch.arange(options.seq - 1, device=device)
    autocast = torch.autocast(device, dtype=torch.bfloat16) if options.dtype == "bf16" else nullcontext()
    for _ in range(steps):
        optimizer.zero_grad()
        with autocast:
            logits = model(input_ids=ids, logits_to_keep=kept).logits
        loss = nn.functional.cross_entropy(
            logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"
        )
        del logits
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
    return optimizer


def _optimizer(trained: list[nn.Parameter], name: str) -> torch.optim.Optimizer:
    if name == "sgd":
        return torch.optim.SGD(trained, lr=1e-4)
    if name == "adamw":
        return torch.optim.AdamW(trained, lr=1e-4, fused=True)
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(trained, lr=1e-4)


def write_random(spec: str, directory: Path) -> None:
    """A model of a shape and random weights, and a tiny one beside it."""
    from transformers import AutoModelForCausalLM

    for shape, target in ((spec, directory), ("tiny", directory / "tiny")):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(read_config(shape), dtype=torch.bfloat16).save_pretrained(target)


def compare(
    spec: str, method: str, options: PlanOptions, *, checkpointing: bool, device: str, base: Path
) -> dict[str, Any]:
    """Predicted and measured bytes; the measurement runs in a process of its own."""
    step: Step = simulate(read_config(spec), method, options, rank=_RANK, checkpointing=checkpointing)
    arguments = [
        *("--measure", str(base), "--methods", method, "--device", device, "--dtype", options.dtype),
        *("--batch", str(options.batch), "--seq", str(options.seq), "--optimizer", options.optimizer),
        *(["--checkpointing"] if checkpointing else []),
    ]
    ran = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, check=False)
    if ran.returncode:
        raise RuntimeError(ran.stderr[-2000:])
    measured = json.loads(ran.stdout.splitlines()[-1])
    held = step.weights + step.constants + step.gradients + step.optimizer
    return {
        "method": method + (", checkpointing" if checkpointing else ""),
        "held": {"predicted": held, "measured": measured["held"], "ratio": round(held / measured["held"], 3)},
        "peak": {
            "predicted": step.peak,
            "measured": measured["peak"],
            "ratio": round(step.peak / measured["peak"], 3),
        },
        "resident": measured.get("resident"),
    }


def main() -> None:
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser()
    parser.add_argument("--base", default="smollm2")
    parser.add_argument("--measure", type=Path)
    parser.add_argument("--methods", default="full,lora,qlora,bottleneck,prefix")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--optimizer", default="adamw")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--checkpointing", action="store_true")
    given = parser.parse_args()
    options = PlanOptions(seq=given.seq, batch=given.batch, dtype=given.dtype, optimizer=given.optimizer)
    if given.measure is not None:
        method, checkpointing = given.methods, given.checkpointing
        found = measure(given.measure, method, options, checkpointing=checkpointing, device=given.device)
        print(json.dumps(found))
        return
    with tempfile.TemporaryDirectory() as directory:
        write_random(given.base, Path(directory))
        for method in given.methods.split(","):
            for checkpointing in (False, True) if method != "prefix" else (False,):
                print(
                    json.dumps(
                        compare(
                            given.base,
                            method,
                            options,
                            checkpointing=checkpointing,
                            device=given.device,
                            base=Path(directory),
                        )
                    ),
                    flush=True,
                )


if __name__ == "__main__":
    main()
