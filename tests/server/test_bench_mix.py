"""`hotswap bench --mix` on a tiny base: its adapters are served, and its figures say what was compared."""

import json

import pytest
import torch
from hotswap_server.bench.mix import measure_mix, write_mix
from hotswap_server.bench.ours import EngineSide
from hotswap_server.bench.workload import Shape
from hotswap_server.engine.base import load_base
from hotswap_server.kernels import select_kernels


def test_every_method_and_all_of_them_are_compared_with_the_base(tiny_base, tokenizer, tmp_path, monkeypatch):
    cpu = torch.device("cpu")
    base = load_base(tiny_base, kernels=select_kernels(cpu, torch.float32), device=cpu, dtype=torch.float32)
    cases = write_mix(base, tmp_path, requests=6, adapters=2, rank=4)
    side = EngineSide(base, tokenizer, tmp_path, 12, 4)
    run, merged = side.run, []

    def noting(*args):
        merged.append(base.merged.ref and base.merged.ref.name)
        return run(*args)

    monkeypatch.setattr(side, "run", noting)
    try:
        figures = measure_mix(side, cases, Shape(8, 6, 4), base.vocab_size, repeat=2, seed=0)
        used = {adapter: side._manager.resolve(adapter, None).method for adapter in cases[-1].names[1:]}
    finally:
        side.close()
    assert list(used.values()) == ["lora", "lora", "bottleneck", "prefix", "ia3"]
    assert [entry["adapters"] for entry in figures] == [0, 2, 2, 1, 1, 2, 1, 2, 2, 5]
    assert [case.name for case in cases if case.merged] == ["LoRA r=4 on all linears, merged"]
    warm_up, one_round = [False] * 10, [False] * 19
    warm_up[4] = one_round[7] = True
    assert [name == "mix/lora-all-0" for name in merged] == warm_up + 2 * one_round
    assert figures[0]["of_base"] == 1.0
    for entry in figures:
        assert entry["requests"] == 6
        assert entry["decode_throughput"] * entry["step_ms"] == pytest.approx(6000)
        assert len(entry["of_base_rounds"]) == 2
        assert max(entry["of_base_rounds"]) > 0
    assert json.loads(json.dumps(figures)) == figures
