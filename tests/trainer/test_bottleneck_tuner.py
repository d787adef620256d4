"""The bottleneck tuner as any tuner of PEFT: checkpoints, several adapters, gradients, refusals."""

from __future__ import annotations

import importlib
import json
import math

import pytest
import torch
from hotswap_trainer.methods.bottleneck.tuner import Bottleneck, BottleneckConfig, register
from hotswap_trainer.methods.bottleneck.tuner.places import find_places
from peft import PeftModel, get_peft_model
from support.bottleneck import HIDDEN, IDS, adapt, logits, make_base, randomise, saved
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel


def test_one_houlsby_adapter_of_4096_by_64():
    adapter = Bottleneck(BottleneckConfig(bottleneck_size=64), 4096)
    assert sum(parameter.numel() for parameter in adapter.parameters()) == 528_448


def test_it_starts_near_the_base():
    base = make_base()
    before = logits(base)
    model = get_peft_model(base, BottleneckConfig(task_type="CAUSAL_LM", bottleneck_size=4))
    assert 0 < (logits(model) - before).abs().max() < 0.02


@pytest.mark.parametrize(
    ("options", "size"),
    [({"bottleneck_size": 5}, 5), ({"bottleneck_size": None, "reduction_factor": 5.0}, 3),
     ({"bottleneck_size": None, "reduction_factor": 100.0}, 1)],
)  # fmt: skip
def test_the_width(options, size, tmp_path):
    tensors = saved(adapt(make_base(), **options), tmp_path)
    assert {t.shape for name, t in tensors.items() if name.endswith("down.weight")} == {(size, HIDDEN)}


def test_the_checkpoint_is_what_servers_read(tmp_path):
    tensors = saved(adapt(make_base(), after_attention=False, layers=[1]), tmp_path)
    stem = "base_model.model.model.layers.1.mlp_adapter"
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {
        f"{stem}.down.weight": (4, HIDDEN),
        f"{stem}.down.bias": (4,),
        f"{stem}.up.weight": (HIDDEN, 4),
        f"{stem}.up.bias": (HIDDEN,),
    }
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    ours = {
        "bottleneck_size": 4,
        "reduction_factor": 16.0,
        "activation": "relu",
        "after_attention": False,
        "after_mlp": True,
        "layout": "houlsby",
        "scaling": 1.0,
        "residual": True,
        "layers": [1],
    }
    assert config["peft_type"] == "BOTTLENECK"
    assert {key: config[key] for key in ours} == ours
    assert config.keys() - ours.keys() == {
        "peft_type",
        "task_type",
        "auto_mapping",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "peft_version",
    }


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_saving_and_loading(tmp_path, low_cpu_mem_usage):
    model = adapt(make_base("gemma2"), layout="pfeiffer", layers=[0])
    saved(model, tmp_path)
    again = PeftModel.from_pretrained(make_base("gemma2"), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(again), logits(model))
    assert not [p for p in again.parameters() if p.requires_grad]


def test_disabling_gives_the_bases_exact_logits():
    base = make_base()
    before = logits(base)
    model = adapt(base, layout="parallel")
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    assert not torch.equal(logits(model), before)
    assert torch.equal(logits(model.unload()), before)


def test_several_adapters():
    alone = {name: logits(adapt(make_base(), seed, layout=layout)) for name, seed, layout in
             [("one", 1, "houlsby"), ("two", 2, "pfeiffer")]}  # fmt: skip
    model = adapt(make_base(), 1, "one", layout="houlsby")
    model.add_adapter("two", BottleneckConfig(task_type="CAUSAL_LM", bottleneck_size=4, layout="pfeiffer"))
    randomise(model, "two", 2)
    for name in ("one", "two", "one"):
        model.set_adapter(name)
        assert torch.equal(logits(model), alone[name])
        trained = {
            key.split("_adapter.")[1].partition(".")[0]
            for key, p in model.named_parameters()
            if p.requires_grad
        }
        assert trained == {name}
    with pytest.warns(UserWarning, match="Adapter one was active"):
        model.delete_adapter("one")
    model.set_adapter("two")
    assert torch.equal(logits(model), alone["two"])
    assert not [key for key, _ in model.named_parameters() if "_adapter.one." in key]


def test_adapters_of_different_layers():
    model = adapt(make_base(), 1, "one", layers=[0])
    expected = logits(adapt(make_base(), 2, layers=[1], bottleneck_size=3))
    model.add_adapter("two", BottleneckConfig(task_type="CAUSAL_LM", bottleneck_size=3, layers=[1]))
    randomise(model, "two", 2)
    model.set_adapter("two")
    assert torch.equal(logits(model), expected)


def test_merging_is_refused():
    with pytest.raises(ValueError, match="is not linear, so it cannot be merged"):
        adapt(make_base()).merge_and_unload()


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(use_reentrant):
    def gradients(checkpointing):
        model = adapt(make_base(), layout="pfeiffer").train()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model(IDS, labels=IDS).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    expected = gradients(False)
    for name, gradient in gradients(True).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-7)


def test_generation_with_a_cache_equals_one_without():
    model = adapt(make_base("gemma2"), layout="parallel")
    cached = model.generate(IDS, max_new_tokens=6, do_sample=False)
    plain = model.generate(IDS, max_new_tokens=6, do_sample=False, use_cache=False)
    assert torch.equal(cached, plain)


def test_bfloat16_bases_get_float32_adapters():
    model = adapt(make_base().bfloat16())
    dtypes = {p.dtype for name, p in model.named_parameters() if "_adapter." in name}
    assert dtypes == {torch.float32}
    assert logits(model).dtype == torch.bfloat16


def test_registering_again_changes_nothing():
    from hotswap_trainer.methods.bottleneck.tuner import config
    from peft import PeftType

    count = len(PeftType)
    register()
    importlib.reload(config)
    assert len(PeftType) == count
    assert PeftType("BOTTLENECK") is PeftType.BOTTLENECK
    assert PeftType.BOTTLENECK in list(PeftType)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bottleneck_size": 0}, "bottleneck_size: must be a whole number over 0"),
        ({"bottleneck_size": True}, "bottleneck_size"),
        ({"bottleneck_size": None, "reduction_factor": 0}, "reduction_factor: must be a number over 0"),
        ({"activation": "mish"}, "activation: must be one of relu"),
        ({"layout": "sideways"}, "layout: must be one of houlsby"),
        ({"scaling": "learned"}, "scaling: must be a number; a learned one is not supported"),
        ({"scaling": math.nan}, "scaling: must be a number"),
        ({"residual": 1}, "residual: must be true or false"),
        ({"after_attention": False, "after_mlp": False}, "at least one must be true"),
        ({"layout": "parallel", "residual": False}, "residual: must be true in the parallel layout"),
        ({"layers": []}, "layers: must be different whole numbers"),
        ({"layers": [1, 1]}, "layers: must be different whole numbers"),
    ],
)
def test_meaningless_configurations_are_refused_by_field(options, message):
    with pytest.raises(ValueError, match=message):
        BottleneckConfig(**options)


def test_layers_that_the_base_does_not_have_are_refused():
    with pytest.raises(ValueError, match="layers: the base has layers 0 to 1"):
        adapt(make_base(), layers=[2])


def test_a_base_whose_places_are_not_found_is_refused():
    class Odd(GPT2LMHeadModel):
        pass

    model = Odd(GPT2Config(vocab_size=24, n_embd=HIDDEN, n_layer=2, n_head=2, n_positions=16))
    for block in model.transformer.h:
        block.mlp2 = block.mlp
        block.add_module("mlp", None)
        block.mlp3 = nn.Linear(HIDDEN, HIDDEN)
    with pytest.raises(ValueError, match=r"Odd cannot take bottleneck adapters: .* one MLP .* mlp2, mlp3"):
        find_places(model)
    for block in model.transformer.h:
        block.attn = nn.Linear(HIDDEN, HIDDEN)
    with pytest.raises(ValueError, match="0 of its 2 decoder layers call transformers' attention interface"):
        find_places(model)
