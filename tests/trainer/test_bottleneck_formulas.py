"""The bottleneck tuner against its formulas."""

from __future__ import annotations

import math

import pytest
import torch
from hotswap_trainer.methods.bottleneck.tuner import BottleneckConfig, BottleneckLayer
from hotswap_trainer.methods.bottleneck.tuner.places import Place
from support.bottleneck import MODELS, adapt, logits, make_base, saved
from torch import nn
from torch.nn.functional import linear

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
