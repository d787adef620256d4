"""The overhead gauge beside `hotswap bench --mix`, on the real base. Wants a quiet machine."""

import statistics

import pytest
import torch
from hotswap_server.bench.mix import measure_mix, write_mix
from hotswap_server.bench.ours import EngineSide
from hotswap_server.bench.workload import Shape
from hotswap_server.core import ServingPath
from hotswap_server.engine.base import load_base
from hotswap_server.engine.calibration import Calibrator
from hotswap_server.kernels import select_kernels
from transformers import AutoTokenizer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

REQUESTS = 8
ROUNDS = 5


@pytest.fixture(scope="module")
def figures_and_gauges(smollm2, tmp_path_factory):
    """Times of base by case in the benchmark, and ratios at batch 8: medians of rounds of both in turn, since
    what a method costs drifts with the machine's memory bandwidth."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    cpu, store = torch.device("cpu"), tmp_path_factory.mktemp("store")
    base = load_base(smollm2, kernels=select_kernels(cpu, torch.float32), device=cpu, dtype=torch.float32)
    cases = write_mix(base, store, requests=REQUESTS, adapters=REQUESTS, rank=16)
    # One kind of LoRA, since a calibration takes all that are on the device.
    cases = [case for case in cases if not case.name.endswith(("q,v", "one for all", "all of them"))]
    side = EngineSide(base, AutoTokenizer.from_pretrained(smollm2), store, 2 * REQUESTS, 16)
    calibrator = Calibrator(side._engine, side._manager.lender)
    ratios: dict[tuple[str, ServingPath], list[float]] = {}
    times: dict[str, list[float]] = {}

    def calibrate() -> None:
        side.merge("mix/lora-all-0")
        for cost in calibrator.calibrate(made_up=False).result().costs:
            if cost.batch == REQUESTS:
                ratios.setdefault((cost.method, cost.path), []).append(cost.ratio)
        side.merge(None)

    try:
        for case in cases:
            side.prepare(case)
        for _ in range(ROUNDS):
            calibrate()
            for entry in measure_mix(side, cases, Shape(64, 32, 16), base.vocab_size, repeat=1, seed=0):
                times.setdefault(entry["case"], []).append(1 / entry["of_base"])
    finally:
        calibrator.close()
        side.close()
        torch.set_num_threads(before)
    for key, values in (times | ratios).items():
        print(key, [round(value, 3) for value in values])
    benched = {case: statistics.median(values) for case, values in times.items()}
    return benched, {key: statistics.median(values) for key, values in ratios.items()}


@pytest.mark.parametrize(
    ("case", "method", "path"),
    [
        ("LoRA r=16 on all linears", "lora", ServingPath.BATCHED),
        ("LoRA r=16 on all linears, merged", "lora", ServingPath.MERGED),
        ("bottleneck-64", "bottleneck", ServingPath.BATCHED),
        ("prefix-20", "prefix", ServingPath.BATCHED),
        ("IA³ on k,v,down", "ia3", ServingPath.BATCHED),
    ],
)
def test_the_gauge_agrees_with_the_benchmark(figures_and_gauges, case, method, path):
    benched, gauges = figures_and_gauges
    assert gauges[method, path] == pytest.approx(benched[case], rel=0.1)


def test_merged_costs_no_more_than_batched(figures_and_gauges):
    _, gauges = figures_and_gauges
    assert gauges["lora", ServingPath.MERGED] <= gauges["lora", ServingPath.BATCHED]
