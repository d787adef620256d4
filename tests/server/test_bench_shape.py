"""`hotswap bench --shape`, with the smallest shape on a CPU: every figure is there, and the report has it."""

import io
import itertools

import pytest
import torch
from hotswap_server.bench import gpu, gpu_engine, quantized, steps
from hotswap_server.bench.gpu_report import print_gpu
from rich.console import Console

GRID = [(1, 1), (8, 1), (8, 8), (32, 1), (32, 32), (64, 1), (64, 32)]


@pytest.fixture(scope="module")
def figures():
    with pytest.MonkeyPatch.context() as patch:
        for module in (gpu, gpu_engine):
            patch.setattr(module, "CONTEXT", 48)
        patch.setattr(gpu_engine, "_NEW_TOKENS", 8)
        patch.setattr(gpu_engine, "_SHORT", 4)
        patch.setattr(steps, "_REPLAYS", 2)
        patch.setattr(steps, "_ROUNDS", 2)
        return gpu.measure_gpu(
            "tiny", torch.device("cpu"), torch.float32, eager=False, tell=lambda text: None
        )


def test_each_method_at_each_batch_with_one_adapter_and_with_many(figures):
    for case in ("LoRA r=16 q,v", "LoRA r=16 all", "IA³", "bottleneck-64", "prefix-20"):
        found = [step for step in figures["steps"] if step["case"] == case]
        assert [(step["batch"], step["adapters"]) for step in found] == GRID, case
        assert all(step["ms"] > 0 and step["floor_ms"] > 0 for step in found)
        for one, many in itertools.pairwise(found):
            if one["batch"] == many["batch"] and case != "prefix-20":
                assert many["floor_ms"] > one["floor_ms"], "distinct adapters are read too"
    base = [step["batch"] for step in figures["steps"] if step["case"] == "base"]
    assert base == [1, 8, 32, 64]
    [mixed] = [step for step in figures["steps"] if step["case"] == "mixed"]
    assert (mixed["batch"], mixed["adapters"]) == (32, 20)


def test_the_engine_and_swaps(figures):
    engine = figures["engine"]
    for name in ("step_ms", "device_ms", "waiting_step_ms", "merged_step_ms", "ttft_ms", "ttft_swapped_ms"):
        assert engine[name] > 0, name
    assert figures["swaps"]["from_file_ms"] > 0
    assert figures["seconds_to_first_answer"] > engine["seconds_to_record"] >= 0


def test_a_base_in_four_bits(figures):
    found = figures["quantized"]
    if "missing" in found:
        pytest.skip(found["missing"])
    cases = [(step["case"], step["batch"], step["adapters"]) for step in found["steps"]]
    kind = quantized.KIND
    assert cases == [
        *((f"base in {kind}", batch, 0) for batch in (1, 8, 32, 64)),
        (f"prompts, {kind}", 16, 0),
        *((f"{kind}, LoRA r=16 all", *at) for at in GRID),
    ]


def test_the_report_fits_a_terminal(figures):
    console = Console(file=io.StringIO(), width=80)
    print_gpu(console, figures)
    shown = console.file.getvalue()
    assert "…" not in shown
    for step in (*figures["steps"], *figures["quantized"].get("steps", ())):
        assert step["case"] in shown
        assert f"{step['ms']:.2f}" in shown
