"""The bottleneck tuner against its formulas, and as any tuner of PEFT."""

from __future__ import annotations

import importlib
import json
import math

import pytest
import torch
from hotswap_trainer.methods.bottleneck.tuner import Bottleneck, BottleneckConfig, BottleneckLayer, register
from hotswap_trainer.methods.bottleneck.tuner.places import find_places
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import linear
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

HIDDEN = 16
MODELS = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "gemma2": (Gemma2Config, Gemma2ForCausalLM, {"head_dim": 8}),
    "olmo2": (Olmo2Config, Olmo2ForCausalLM, {}),
}
IDS = torch.tensor([[1, 5, 9, 13, 17], [2, 3, 4, 6, 7]])
ACTIVATIONS = {
    "relu": lambda z: z.clamp(min=0),
    "gelu": lambda z: z * 0.5 * (1 + torch.erf(z / math.sqrt(2))),
    "gelu_new": lambda z: 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))),
    "silu": lambda z: z * torch.sigmoid(z),
    "swish": lambda z: z * torch.sigmoid(z),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "leakyrelu": lambda z: torch.where(z > 0, z, 0.01 * z),
}


def make_base(kind="llama"):
    config, model, options = MODELS[kind]
    torch.manual_seed(0)
    return model(
        config(
            vocab_size=24,
            hidden_size=HIDDEN,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            initializer_range=0.2,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
            **options,
        )
    ).eval()


def adapt(base, seed=1, adapter="default", **options):
    """A PEFT model whose adapter has weights that matter."""
    options = {"bottleneck_size": 4, **options}
    model = get_peft_model(base, BottleneckConfig(task_type="CAUSAL_LM", **options), adapter_name=adapter)
    randomise(model, adapter, seed)
    return model


def randomise(model, adapter, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f"_adapter.{adapter}." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def f(weights, prefix, z, *, activation="relu", scaling=1.0):
    down = linear(z, weights[f"{prefix}.down.weight"], weights[f"{prefix}.down.bias"])
    return scaling * linear(
        ACTIVATIONS[activation](down), weights[f"{prefix}.up.weight"], weights[f"{prefix}.up.bias"]
    )


def by_hand(kind, weights, layout, *, scaling=1.0, residual=True, activation="relu"):
    """The logits of an adapted model, layer by layer in the open, from the tensors of a checkpoint."""
    model = make_base(kind)

    def adapted(x, s, prefix):
        z = {"houlsby": x, "pfeiffer": x + s, "parallel": s}[layout]
        return residual * x + f(weights, prefix, z, activation=activation, scaling=scaling)

    def forward(layer, number, s, **kwargs):
        prefix = f"base_model.model.model.layers.{number}"
        norms = dict(layer.named_children())
        before = norms.get("input_layernorm", nn.Identity())
        x, _ = layer.self_attn(hidden_states=before(s), **kwargs)
        if kind in ("gemma2", "olmo2"):
            x = layer.post_attention_layernorm(x)
        s = s + adapted(x, s, f"{prefix}.attention_adapter")
        between = {"gemma2": "pre_feedforward_layernorm", "olmo2": None}.get(kind, "post_attention_layernorm")
        x = layer.mlp(norms[between](s) if between else s)
        if kind in ("gemma2", "olmo2"):
            x = layer.post_feedforward_layernorm(x)
        return s + adapted(x, s, f"{prefix}.mlp_adapter")

    class Hand(nn.Module):
        def __init__(self, layer, number):
            super().__init__()
            self.layer, self.number = [layer], number

        def forward(self, hidden_states, past_key_values=None, **kwargs):
            return forward(self.layer[0], self.number, hidden_states, past_key_values=None, **kwargs)

    for number, layer in enumerate(model.model.layers):
        model.model.layers[number] = Hand(layer, number)
    return logits(model)


def saved(model, directory):
    model.save_pretrained(directory, save_embedding_layers=False)
    return load_file(directory / "adapter_model.safetensors")


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("layout", ["houlsby", "pfeiffer", "parallel"])
def test_the_formulas_of_each_layout(kind, layout, tmp_path):
    model = adapt(make_base(kind), layout=layout, scaling=1.5)
    expected = by_hand(kind, saved(model, tmp_path), layout, scaling=1.5)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)
    assert (logits(model) - logits(make_base(kind))).abs().max() > 0.05


@pytest.mark.parametrize("layout", ["houlsby", "pfeiffer"])
def test_without_residual(layout, tmp_path):
    model = adapt(make_base(), layout=layout, residual=False)
    expected = by_hand("llama", saved(model, tmp_path), layout, residual=False)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layout", ["houlsby", "pfeiffer", "parallel"])
def test_a_layer_on_weights_made_by_hand(activation, layout):
    """Within 1e-6, on numbers that show which is which."""

    class Norm(nn.Module):
        def forward(self, hidden_states):
            return hidden_states / 2

    class Sublayer(nn.Module):
        def forward(self, hidden_states):
            return 3 * hidden_states

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.attention, self.mlp = Norm(), Sublayer(), nn.Linear(2, 2)

        def forward(self, hidden_states):
            return hidden_states + self.attention(self.norm(hidden_states))

    from hotswap_trainer.methods.bottleneck.tuner.places import Place

    config = BottleneckConfig(
        bottleneck_size=1, activation=activation, layout=layout, scaling=2.0, after_mlp=False
    )
    layer = BottleneckLayer(Layer(), {"attention": Place("norm", "attention")})
    layer.update_layer("default", config, 2)
    adapter = layer.attention_adapter["default"]
    with torch.no_grad():
        adapter.down.weight.copy_(torch.tensor([[0.5, -1.0]]))
        adapter.down.bias.fill_(0.25)
        adapter.up.weight.copy_(torch.tensor([[1.0], [-2.0]]))
        adapter.up.bias.copy_(torch.tensor([0.1, 0.2]))
    s = torch.tensor([[1.0, 2.0], [-3.0, 0.5]])
    x = 1.5 * s
    z = {"houlsby": x, "pfeiffer": x + s, "parallel": s}[layout]
    inner = ACTIVATIONS[activation](z @ torch.tensor([0.5, -1.0]) + 0.25)
    fz = 2.0 * (inner[:, None] * torch.tensor([1.0, -2.0]) + torch.tensor([0.1, 0.2]))
    torch.testing.assert_close(layer(s), s + x + fz, rtol=0, atol=1e-6)


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
