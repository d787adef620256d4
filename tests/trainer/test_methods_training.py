"""Every method through a whole run: it learns, publishes, resumes, and refuses what it cannot do."""

from __future__ import annotations

import json

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from hotswap_trainer.config import configure
from hotswap_trainer.errors import OptionError
from hotswap_trainer.methods.qlora import METHOD
from hotswap_trainer.run import train
from peft import PeftModel
from safetensors.torch import load_file
from support.quantized import unpacked
from transformers import AutoModelForCausalLM, AutoTokenizer

METHODS = {
    "bottleneck": {"bottleneck_size": 16, "learning_rate": 1e-2},
    "prefix": {"num_virtual_tokens": 8, "learning_rate": 5e-2},
    "ia3": {"learning_rate": 3e-1},
    "qlora": {"rank": 4, "learning_rate": 2e-2},
    "full": {"learning_rate": 1e-3},
}
KIND = {
    "bottleneck": "BOTTLENECK",
    "prefix": "PREFIX_TUNING",
    "ia3": "IA3",
    "qlora": "LORA",
}


@pytest.fixture
def method_flags(flags):
    """Options of a short run of a method, without LoRA's."""

    def make(method, **options):
        common = {key: value for key, value in flags.items() if key not in ("rank", "learning_rate")}
        return {**common, "method": method, **METHODS[method], **options}

    return make


def tensors(published):
    return load_file(published.path / "adapter_model.safetensors")


def config(published):
    return json.loads((published.path / "adapter_config.json").read_text())


@pytest.mark.parametrize("method", METHODS)
def test_it_learns(method_flags, method):
    published = train(configure(method_flags(method, max_steps=100, batch_size=8)))
    losses = [p.loss for p in published.report.outcome.history if p.kind == "eval"]
    assert losses[-1] < 0.7 * losses[0]
    record = json.loads((published.path / "training.json").read_text())
    assert record["method"] == method
    assert (published.path / "loss.png").stat().st_size > 1000


@pytest.mark.parametrize("method", KIND)
def test_what_is_published_is_a_peft_directory(method_flags, method, tiny_base):
    published = train(configure(method_flags(method)))
    assert config(published)["peft_type"] == KIND[method]
    ids = torch.tensor([[3, 4, 5]])
    base = AutoModelForCausalLM.from_pretrained(tiny_base)
    with torch.no_grad():
        before = base(ids).logits
        after = PeftModel.from_pretrained(base, published.path)(ids).logits
    assert not torch.allclose(before, after)
    card = (published.path / "README.md").read_text()
    assert ("import hotswap_trainer.methods.bottleneck.tuner" in card) == (method == "bottleneck")


def test_a_qlora_is_an_ordinary_lora(method_flags, flags):
    published = train(configure(method_flags("qlora", quant_type="fp4", double_quant=False)))
    assert published.report.parameters == train(configure(flags)).report.parameters
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors(published).items()}
    assert shapes["base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"] == (4, 48)
    assert {tensor.dtype for tensor in tensors(published).values()} == {torch.float32}
    assert not [key for key in config(published) if "quant" in key and key != "qalora_group_size"]


def test_qlora_holds_the_base_in_4_bits(method_flags, tiny_base):
    run = configure(method_flags("qlora"))
    arguments = METHOD.base_arguments(run.method_options, torch.float32)
    model = METHOD.attach(AutoModelForCausalLM.from_pretrained(tiny_base, **arguments), run.method_options)
    layer = model.base_model.model.model.layers[0].mlp.up_proj.base_layer
    assert isinstance(layer, Linear4bit)
    assert layer.weight.quant_state.nested
    assert layer.weight.quant_type == "nf4"
    assert {name.rpartition("lora_")[1] for name, p in model.named_parameters() if p.requires_grad} == {
        "lora_"
    }


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_qlora_computes_with_what_was_quantised(method_flags, tiny_base, quant_type):
    """On every processor, in training and after an evaluation, and where rows end in the midst of a block."""
    run = configure(method_flags("qlora", quant_type=quant_type))
    arguments = METHOD.base_arguments(run.method_options, torch.float32)
    model = METHOD.attach(AutoModelForCausalLM.from_pretrained(tiny_base, **arguments), run.method_options)
    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    assert len(layers) == 14
    assert any(layer.in_features % layer.weight.quant_state.blocksize for layer in layers)
    expected = [unpacked(layer.weight.data, layer.weight.quant_state) for layer in layers]
    for training in (True, False, True):
        for layer, weight in zip(layers, expected, strict=True):
            layer.train(training)
            x = torch.randn(3, layer.in_features)
            torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, weight), atol=1e-5, rtol=1e-5)


def test_a_prefix_has_the_shape_of_grouped_query_attention(method_flags):
    plain = train(configure(method_flags("prefix")))
    projected = train(configure(method_flags("prefix", prefix_projection=True, encoder_hidden_size=12)))
    for published in (plain, projected):
        ((name, tensor),) = tensors(published).items()
        assert (name, tuple(tensor.shape)) == ("prompt_embeddings", (8, 2 * 2 * 2 * 8))
        assert (config(published)["token_dim"], config(published)["num_attention_heads"]) == (16, 2)
    assert config(projected)["prefix_projection"] is True


def test_a_prefix_starts_as_text_that_the_base_has_read(method_flags, tiny_base, monkeypatch):
    """Which tells too that keys and values lie where PEFT, and with it a server, looks for them."""
    from hotswap_trainer.methods.prefix import METHOD

    options = configure(method_flags("prefix", num_virtual_tokens=4)).method_options
    base = AutoModelForCausalLM.from_pretrained(tiny_base)
    first, after = torch.tensor([[base.config.bos_token_id, 9, 8, 7]]), torch.tensor([[5, 6, 7]])
    monkeypatch.setattr(torch, "randint", lambda *_: first.clone())
    with torch.no_grad():
        expected = base(torch.cat([first, after], dim=1)).logits[:, 4:]
        found = METHOD.attach(base, options)(after).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_ia3_scales_outputs_and_feedforward_inputs(method_flags):
    published = train(configure(method_flags("ia3")))
    shapes = {
        name.removeprefix("base_model.model.model.layers.0."): tuple(tensor.shape)
        for name, tensor in tensors(published).items()
        if ".0." in name
    }
    assert shapes == {
        "mlp.down_proj.ia3_l": (1, 48),
        "self_attn.k_proj.ia3_l": (16, 1),
        "self_attn.v_proj.ia3_l": (16, 1),
    }
    assert config(published)["feedforward_modules"] == ["down_proj"]


@pytest.mark.parametrize("options", [{"method": "prefix", "prefix_projection": True}, {"method": "full"}])
def test_a_run_resumes_where_it_stopped(method_flags, options, monkeypatch):
    from hotswap_trainer import run as run_module

    flags = method_flags(**options, save_every=2, max_steps=6)

    def fail(*arguments, **keywords):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "publish", fail)
        with pytest.raises(OptionError, match="disk full"):
            train(configure(flags))
    resumed = train(configure(flags))
    fresh = train(configure({**flags, "resume": False, "output": flags["output"] / "fresh"}))
    file = "model.safetensors" if options["method"] == "full" else "adapter_model.safetensors"
    expected = load_file(fresh.path / file)
    for name, tensor in load_file(resumed.path / file).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-7)


def test_full_publishes_a_base_of_its_own(method_flags, tiny_base, tokenizer):
    from hotswap.layout import versions_in

    published = train(configure(method_flags("full", gradient_checkpointing=True)))
    assert published.path == published.report.run.options.output / "acme" / "task" / "1"
    names = {path.name for path in published.path.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "training.json", "loss.png"} <= names
    assert versions_in(names) == []  # nothing that a store's reader takes for an adapter
    parameters = published.report.parameters
    assert parameters.trainable == parameters.total
    model = AutoModelForCausalLM.from_pretrained(published.path)
    base = AutoModelForCausalLM.from_pretrained(tiny_base)
    assert model.config.use_cache
    assert model.config.dtype == torch.float32
    changed = [not torch.equal(p, base.get_parameter(name)) for name, p in model.named_parameters()]
    assert all(changed)
    reloaded = AutoTokenizer.from_pretrained(published.path)
    assert reloaded("a")["input_ids"] == tokenizer("a")["input_ids"]
    assert "hotswap serve --base THIS_DIRECTORY" in (published.path / "README.md").read_text()
    assert train(configure(method_flags("full"))).version == 2


def test_full_in_bfloat16_trains_in_float32(method_flags):
    from hotswap_trainer.methods.full import METHOD

    assert METHOD.base_arguments(None, torch.bfloat16) == {"dtype": torch.float32}
    published = train(configure(method_flags("full", dtype="bfloat16", max_steps=2)))
    assert {t.dtype for t in load_file(published.path / "model.safetensors").values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("prefix", {"gradient_checkpointing": True}, "--gradient-checkpointing: does not work with prefix"),
        ("prefix", {"num_virtual_tokens": 0}, "--num-virtual-tokens: must be at least 1"),
        ("prefix", {"encoder_hidden_size": 8}, "--encoder-hidden-size: needs --prefix-projection"),
        ("prefix", {"packing": True}, "unknown key packing"),
        ("ia3", {"target_modules": "nope", "feedforward_modules": ""}, "nope matches no layer.*k_proj"),
        ("ia3", {"target_modules": "k_proj"}, "--feedforward-modules: each must be one of --target-modules"),
        ("ia3", {"target_modules": "all-linear"}, "--target-modules: .*all-linear is LoRA's"),
        ("qlora", {"quant_type": "int3"}, "--quant-type: must be one of nf4, fp4"),
        ("full", {"rank": 4}, "--rank: belongs to method lora and qlora, not to full"),
        ("bottleneck", {"layers": "0-2"}, "--layers: the base has layers 0 to 1"),
        ("bottleneck", {"reduction_factor": 4.0}, "--bottleneck-size: give it or --reduction-factor"),
        ("bottleneck", {"after_attention": False, "after_mlp": False}, "leaves nothing to adapt"),
        ("bottleneck", {"layout": "parallel", "residual": False}, "--no-residual: has no meaning"),
        ("bottleneck", {"bottleneck_size": 0}, "--bottleneck-size: must be at least 1"),
        ("bottleneck", {"activation": "swoosh"}, "--activation: must be one of relu"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(method_flags, method, options, message):
    with pytest.raises(OptionError, match=message):
        train(configure(method_flags(method, **options)))


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (
            {"use_dora": True, "target_modules": "q_proj"},
            {"lora_magnitude_vector", "lora_A.weight", "lora_B.weight"},
        ),
        ({"target_modules": "embed_tokens"}, {"lora_embedding_A", "lora_embedding_B"}),
        ({"target_modules": "lm_head"}, {"lora_A.weight", "lora_B.weight"}),
    ],
)
def test_more_of_lora(flags, options, names):
    published = train(configure({**flags, **options, "max_steps": 1}))
    found = {name.partition(".lora_")[2] for name in tensors(published)}
    assert {f"lora_{name}" for name in found} == names


@pytest.mark.parametrize(("bias", "expected"), [("all", 14), ("lora_only", 4)])
def test_biases_are_trained_and_saved(flags, tokenizer, tmp_path, bias, expected):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    biased = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
        mlp_bias=True,
    )
    base = tmp_path / "biased"
    LlamaForCausalLM(biased).save_pretrained(base)
    tokenizer.save_pretrained(base)
    options = {"base": str(base), "bias": bias, "target_modules": "q_proj,v_proj"}
    published = train(configure({**flags, **options}))
    saved = {name: tensor for name, tensor in tensors(published).items() if name.endswith(".bias")}
    assert len(saved) == expected
    assert any(tensor.abs().max() > 0 for tensor in saved.values())


def test_biases_that_do_not_exist_are_refused(flags):
    with pytest.raises(OptionError, match="--bias: all would train nothing more"):
        train(configure({**flags, "bias": "all"}))
