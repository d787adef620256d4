"""Plans against what steps take. Each measurement is a process of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hotswap_trainer.planning import PlanOptions
from support.measured_step import compare, write_random

HELD, PEAK = (
    0.10,
    0.20,
)  # what a prediction may be off by: of weights, gradients and optimizer; with activations

CASES = [
    ("full", False),
    ("lora", True),
    ("qlora", False),
    ("qlora", True),
    ("bottleneck", False),
    ("prefix", False),
]
_PROCESS = 64 * 1024**2  # what a process's own heap may grow by


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("smollm2")
    write_random("smollm2", directory)
    return directory


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("method", "checkpointing"), CASES)
def test_memory_on_a_cpu(smollm2: Path, method: str, checkpointing: bool) -> None:
    options = PlanOptions(seq=128, batch=1, dtype="fp32")
    found = compare("smollm2", method, options, checkpointing=checkpointing, device="cpu", base=smollm2)
    print(found)
    held = found["held"]
    assert held["measured"] == pytest.approx(held["predicted"], rel=HELD, abs=_PROCESS), found
    assert found["peak"]["ratio"] == pytest.approx(1, abs=PEAK), found


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", ["full", "lora", "bottleneck", "prefix"])
def test_the_cuda_allocators_peak(tmp_path: Path, method: str, checkpointing: bool) -> None:
    if method == "prefix" and checkpointing:
        pytest.skip("the trainer refuses it")
    write_random("llama-1b", tmp_path)
    options = PlanOptions(seq=2048, batch=2, dtype="bf16")
    found = compare("llama-1b", method, options, checkpointing=checkpointing, device="cuda", base=tmp_path)
    assert found["held"]["ratio"] == pytest.approx(1, abs=HELD), found
    assert found["peak"]["ratio"] == pytest.approx(1, abs=PEAK), found
