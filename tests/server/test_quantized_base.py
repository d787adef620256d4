"""Bases in 4 and 8 bits: every method in one batch against PEFT over the same base, and what is refused."""

import copy
import json
import shutil
import sys

import bitsandbytes
import pytest
import torch
from hotswap_server.core import ServingPath
from hotswap_server.engine.base import load_base
from hotswap_server.engine.projection import StackedProjection
from hotswap_server.errors import BaseModelError, InvalidRequestError
from hotswap_server.kernels import select_kernels
from hotswap_server.kernels.quantized import FourBitProjection
from support.mixed import PRESSURE, arrive_under_pressure, assert_equal, make_oracles, start, write_store
from support.models import FAMILIES, generate_greedily, next_logits, prepared, random_prompt, tiny_model
from support.quantized import QuantizedOracle, quantize, unpacked
from support.running import Running
from torch import nn
from transformers import AutoModelForCausalLM

CPU = torch.device("cpu")
KINDS = ("nf4", "fp4", "int8")


def load(path, quantize=None, *, kernels="auto", dtype=torch.float32):
    return load_base(
        path, kernels=select_kernels(CPU, dtype, kernels), device=CPU, dtype=dtype, quantize=quantize
    )


def whole_blocks(family):
    """Rows end with a block of 64: others bitsandbytes, and with it PEFT, unpacks wrongly on some CPUs."""
    config = copy.deepcopy(FAMILIES[family])
    config.intermediate_size = 128
    return tiny_model(config)


@pytest.fixture(scope="module")
def llama():
    return whole_blocks("llama")


@pytest.fixture(scope="module")
def directory(llama, tmp_path_factory):
    """The tiny Llama as a transformers directory, not tied, so that its head could be quantised."""
    path = tmp_path_factory.mktemp("base")
    llama.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def store(llama, tmp_path_factory):
    return write_store(llama, tmp_path_factory.mktemp("store"))


@pytest.mark.parametrize("kind", ["nf4", pytest.param("fp4", marks=pytest.mark.slow), "int8"])
def test_all_methods_get_peft_s_tokens_over_the_same_base(kind, directory, store, tokenizer):
    reference = quantize(directory, kind)
    oracles = make_oracles(reference, store, QuantizedOracle)
    base = load(directory, kind)
    assert base.quantization == kind
    with Running(base, tokenizer, store, **PRESSURE) as running:
        plain, others = arrive_under_pressure(running, order=5)
        alone = []
        for name, outcome in others[: len(oracles)]:
            adapter = name and f"acme/{name}"
            alone.append(running.generate(outcome.request.prompt_ids, adapter, max_new_tokens=24).result())
    for name, outcome in [(None, plain[0]), *others[: len(oracles)]]:
        assert_equal(oracles, name, outcome)
    assert [outcome.tokens for outcome in alone] == [o.tokens for _, o in others[: len(alone)]]


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_merge_is_made_in_the_type_of_the_activations(kind, directory, store, tokenizer):
    """Never requantised: merged and beside a merge, answers are PEFT's; then the base is back."""
    reference = quantize(directory, kind)
    names = (None, "lora4", "dora5", "ia3")
    oracles = {
        name: QuantizedOracle(reference, {f"acme/{name}": store / "acme" / name / "1"} if name else {})
        for name in names
    }
    base = load(directory, kind)
    with Running(base, tokenizer, store) as running:
        running.merge("acme/lora4")
        for name, outcome in [start(running, name, 9 + i, seed=i) for i, name in enumerate(names)]:
            assert_equal(oracles, name, outcome)
            assert (outcome.finished.path is ServingPath.MERGED) is (name == "lora4")
        running.unmerge("acme/lora4")
        assert_equal(oracles, None, start(running, None, 9, seed=0)[1])
    assert all(isinstance(group.projection, StackedProjection) for group in base.projections)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["qwen2", "gemma2"])
def test_biases_tied_heads_and_logits(kind, family, tokenizer, tmp_path):
    """Qwen 2 has biases, Gemma 2 shares its head with the embedding: the quantiser must leave that alone."""
    whole_blocks(family).save_pretrained(tmp_path / "base")
    oracle = QuantizedOracle(quantize(tmp_path / "base", kind), {}).model(None)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32).eval()
    base = load(tmp_path / "base", kind)
    prompt = random_prompt(30, seed=1)
    with Running(base, tokenizer, tmp_path) as running:
        outcome = running.generate(prompt, max_new_tokens=12, logprobs=20).result()
    assert outcome.tokens == generate_greedily(oracle, prompt, 12)
    reference = next_logits(oracle, prompt).log_softmax(-1)
    for token, value in outcome.logprobs[0].top:
        assert value == pytest.approx(float(reference[token]), abs=1e-4)
    assert (reference - next_logits(plain, prompt).log_softmax(-1)).abs().max() > 1e-2


@pytest.mark.parametrize("kernels", ["native", "onednn", "reference"])
def test_every_kernel_set_serves_it(kernels, directory, tokenizer, tmp_path):
    prompt = random_prompt(20, seed=2)
    base = load(directory, "nf4", kernels=kernels)
    assert base.state.kernels.name == kernels
    with Running(base, tokenizer, tmp_path) as running:
        got = running.generate(prompt, max_new_tokens=12).result().tokens
    assert got == generate_greedily(quantize(directory, "nf4"), prompt, 12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_projection_and_its_weight(kind, dtype, directory):
    """The product is the one with `weight()`, which is what bitsandbytes itself dequantises to."""
    model = quantize(directory, kind, dtype)
    base = prepared(model)
    group = base.projections[0]
    assert isinstance(group.projection, StackedProjection)
    x = torch.randn(9, group.in_features, dtype=dtype)
    weight, precision = group.projection.weight(), 1e-4 if dtype == torch.float32 else 0.1
    assert weight.dtype == dtype
    expected = x.float() @ weight.float().t()
    torch.testing.assert_close(group.projection(x).float(), expected, atol=precision, rtol=precision)
    for name, member in zip(group.names, group.projection.members, strict=True):
        linear = model.get_submodule(name)
        if kind == "int8":
            linear_weight = linear.weight.data.float() * linear.weight.SCB[:, None] / 127
        else:
            linear_weight = bitsandbytes.functional.dequantize_4bit(
                linear.weight.data, linear.weight.quant_state
            )
            assert torch.equal(member.packed, linear.weight.data)
            assert member.state.nested
        torch.testing.assert_close(group.weight_of(name), linear_weight.to(dtype))
    assert torch.equal(weight, torch.cat([group.weight_of(name) for name in group.names]))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize(("rows", "inputs"), [(16, 96), (33, 48), (5, 6), (8, 128)])
def test_blocks_follow_one_another_whatever_the_rows(kind, nested, rows, inputs):
    torch.manual_seed(0)
    weight = torch.randn(rows, inputs) * torch.rand(rows, 1)
    packed, state = bitsandbytes.functional.quantize_4bit(weight, quant_type=kind, compress_statistics=nested)
    projection = FourBitProjection(packed, state, None, torch.float32)
    assert torch.equal(projection.weight(), unpacked(packed, state))
    x = torch.randn(3, inputs)
    expected = torch.nn.functional.linear(x.double(), unpacked(packed, state).double()).float()
    torch.testing.assert_close(projection(x), expected, atol=1e-5, rtol=1e-5)


def test_no_row_of_an_int8_product_depends_on_the_others(directory):
    """Unlike in bitsandbytes' own, where one large value changes the columns of all."""
    model = quantize(directory, "int8")
    projection = prepared(model).projections[0].projection.members[0]
    theirs = model.get_submodule("model.layers.0.self_attn.q_proj")
    torch.manual_seed(0)
    x = torch.randn(2, 64)
    beside = x.clone()
    beside[1] *= 100.0
    torch.testing.assert_close(projection(x)[0], projection(beside)[0], atol=1e-6, rtol=0)
    assert (theirs(x)[0] - theirs(beside)[0]).abs().max() > 1e-3


def test_what_the_weights_take(directory):
    plain, nf4, int8 = load(directory), load(directory, "nf4"), load(directory, "int8")
    assert plain.quantization is None
    quantised = sum(rows * columns for rows, columns in plain.linear_shapes.values())
    rest = plain.weight_bytes - 4 * quantised
    # A byte for two weights, a byte for the scale of 64, and 256 of these share four bytes and end in one.
    assert nf4.weight_bytes == pytest.approx(rest + quantised * (1 / 2 + 1 / 64 + 1 / 4096), abs=4 * 14)
    assert int8.weight_bytes == rest + quantised + sum(4 * rows for rows, _ in plain.linear_shapes.values())


@pytest.mark.parametrize("kind", KINDS)
def test_a_base_stored_in_few_bits_needs_no_option(kind, directory, tokenizer, tmp_path):
    model = quantize(directory, kind)
    model.save_pretrained(tmp_path / "stored")
    prompt = random_prompt(20, seed=3)
    for option in (None, kind):
        base = load(tmp_path / "stored", option)
        assert base.quantization == kind
        with Running(base, tokenizer, tmp_path) as running:
            got = running.generate(prompt, max_new_tokens=8).result().tokens
        assert got == generate_greedily(QuantizedOracle(model, {}).model(None), prompt, 8)
    other = "fp4" if kind == "nf4" else "nf4"
    with pytest.raises(InvalidRequestError, match=f"quantize: the base is stored in {kind} already"):
        load(tmp_path / "stored", other)


def test_a_linear_that_was_left_out_when_it_was_stored(directory, tokenizer, tmp_path):
    """Its group has members of both sorts."""
    model = quantize(directory, "nf4", skip=["k_proj", "lm_head"])
    model.save_pretrained(tmp_path / "stored")
    assert type(model.model.layers[0].self_attn.k_proj) is nn.Linear
    prompt = random_prompt(20, seed=3)
    with Running(load(tmp_path / "stored"), tokenizer, tmp_path) as running:
        got = running.generate(prompt, max_new_tokens=8).result().tokens
    assert got == generate_greedily(model, prompt, 8)


def test_another_stored_quantisation_is_refused_by_name(directory, tmp_path):
    shutil.copytree(directory, tmp_path / "gptq")
    config = json.loads((tmp_path / "gptq" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "gptq" / "config.json").write_text(json.dumps(config))
    with pytest.raises(BaseModelError, match="quant_method 'gptq', which is not served"):
        load(tmp_path / "gptq")


def test_an_odd_number_of_inputs_is_refused_in_4_bits_and_served_in_8(tokenizer, tmp_path):
    config = copy.deepcopy(FAMILIES["llama"])
    config.intermediate_size = 97
    tiny_model(config).save_pretrained(tmp_path / "odd")
    with pytest.raises(BaseModelError, match=r"mlp\.down_proj has 97 inputs, an odd number"):
        load(tmp_path / "odd", "nf4")
    oracle = QuantizedOracle(quantize(tmp_path / "odd", "int8"), {}).model(None)
    prompt = random_prompt(9, seed=4)
    with Running(load(tmp_path / "odd", "int8"), tokenizer, tmp_path) as running:
        assert running.generate(prompt).result().tokens == generate_greedily(oracle, prompt, 8)


@pytest.mark.parametrize("package", ["bitsandbytes", "accelerate"])
def test_a_missing_package_is_named_with_the_extra(package, directory, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InvalidRequestError, match=rf"quantize: .*{package}.*pip install 'hotswap\[server\]'"):
        load(directory, "nf4")
    assert load(directory).quantization is None


def test_an_unknown_kind_is_refused(directory):
    with pytest.raises(InvalidRequestError, match="quantize: must be one of nf4, fp4, int8, got 'int3'"):
        load(directory, "int3")
