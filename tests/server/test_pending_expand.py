"""Wide halves of LoRAs that a block's bottleneck adapters add beside their own: of other tokens, at once."""

import numpy as np
import pytest
import torch
from hotswap_server.adapters.method import BankOptions
from hotswap_server.adapters.methods.bottleneck import BottleneckBank
from hotswap_server.bench.shapes import random_bottleneck
from hotswap_server.engine.batch import token_slots
from hotswap_server.kernels.interface import GroupedLora, PendingExpand
from hotswap_server.kernels.reference import ReferenceKernels
from support.adapters import write_bottleneck, write_lora
from support.models import FAMILIES, prepared, random_prompt, tiny_model
from support.running import Running

CPU = torch.device("cpu")
NAMES = ("acme/lora", "acme/dora", "acme/mlp", None)


def test_two_halves_make_a_lora():
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(9, 20, generator=generator), torch.randn(12, 20, generator=generator)
    a, b = torch.randn(3, 2, 5, 20, generator=generator), torch.randn(2, 3, 5, 6, generator=generator)
    ranks = torch.tensor([[5, 2], [0, 3], [0, 0]], dtype=torch.int32)
    bank = GroupedLora(a, (b[0], b[1]), ranks, (6, 6), (0, 6))
    slots = token_slots(np.array([0, 0, 1, -1, 2, *[1] * 4], np.int32), CPU)
    kernels = ReferenceKernels()
    product = kernels.projection(weight, None)
    expected = product(x)
    kernels.lora(x, bank, slots, expected)
    found = kernels.project_and_shrink(product, x, bank, slots)
    assert found is not None
    got, pending = found
    torch.testing.assert_close(got, product(x), atol=0, rtol=0)
    kernels.expand(pending, got)
    torch.testing.assert_close(got, expected)


def test_requests_of_both_methods_are_as_alone(tokenizer, tmp_path, monkeypatch):
    """DoRA scales what comes out, so what it changes is never left; nor is what no adapter comes after."""
    model = tiny_model(FAMILIES["llama"])
    write_lora(model, tmp_path / "acme" / "lora" / "1", r=3, target_modules="all-linear")
    write_lora(model, tmp_path / "acme" / "dora" / "1", r=3, target_modules=["o_proj"], use_dora=True)
    write_bottleneck(model, tmp_path / "acme" / "mlp" / "1", bottleneck_size=5, after_attention=False)
    left = []
    both = ReferenceKernels.bottleneck_and_expand

    def count(self, stream, x, table, slots, pending):
        left.append(pending)
        both(self, stream, x, table, slots, pending)

    monkeypatch.setattr(ReferenceKernels, "bottleneck_and_expand", count)

    def answers(*groups):
        with Running(prepared(model, "reference"), tokenizer, tmp_path) as running:
            for name in filter(None, NAMES):
                running.generate(random_prompt(2, seed=0), name, max_new_tokens=1).result()
            outcomes = []
            for names in groups:
                started = [
                    running.generate(random_prompt(9, seed=NAMES.index(name)), name, max_new_tokens=12)
                    for name in names
                ]
                outcomes += [outcome.result().tokens for outcome in started]
            return outcomes

    alone = answers(*([name] for name in NAMES))
    assert not left
    assert answers(NAMES) == alone
    # Of the two blocks of a layer the bottleneck adapter is after one.
    assert {pending.bank.a.shape[-1] for pending in left} == {model.config.intermediate_size}


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_block_knows_the_layer_that_makes_its_output(family):
    base = prepared(tiny_model(FAMILIES[family]))
    blocks = [group.block for group in base.groups if group.block is not None]
    # Gemma 2 has norms in between.
    assert blocks == (list(base.blocks) if family == "llama" else [])


def test_an_adapter_that_comes_during_a_step_is_met_in_the_next():
    base = prepared(tiny_model(FAMILIES["llama"]))
    block, state = base.blocks[0], base.state
    x = torch.randn(1, 2, block.hidden_size)
    bank = GroupedLora(torch.ones(1, 1, 1, 4), (), torch.ones(1, 1, dtype=torch.int32), (), ())
    pending = PendingExpand(torch.ones(2, 1, 1, 1), bank, torch.zeros(1, 3, dtype=torch.int32))
    state.slots = {"lora": token_slots(np.array([0, 0], np.int32), CPU)}
    block.read((x,), {})
    BottleneckBank(base, BankOptions(num_slots=1, max_bottleneck_size=4)).put(0, random_bottleneck(base, 4))
    assert block.deltas
    assert not block.leave(pending)
    assert block.write(x) is x
    block.read((x,), {})
    assert block.leave(pending)
    assert block.take_pending() is pending
    assert block.take_pending() is None
