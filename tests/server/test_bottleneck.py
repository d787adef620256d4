"""Bottleneck adapters against PEFT with the trainer's tuner: every kind, alone and together, and refusals."""

import json
from functools import partial

import pytest
import torch
from hotswap_server.errors import AdapterInvalidError
from support.adapters import Oracle, edit_config, edit_tensors, write_bottleneck, write_lora
from support.models import FAMILIES, explain, prepared, random_prompt, tiny_model
from support.running import Outcome, Running
from transformers import Olmo2Config

NEW_TOKENS = 20
VARIANTS = {
    "houlsby": {"bottleneck_size": 8},
    "pfeiffer": {"bottleneck_size": 5, "layout": "pfeiffer", "after_attention": False, "activation": "gelu"},
    "parallel": {"bottleneck_size": 33, "layout": "parallel", "after_mlp": False, "scaling": 1.7},
    "both_parallel": {"bottleneck_size": 3, "layout": "parallel", "activation": "tanh"},
    "both_pfeiffer": {"bottleneck_size": 4, "layout": "pfeiffer", "activation": "gelu_new"},
    "no_residual": {"bottleneck_size": 16, "residual": False, "activation": "silu", "after_mlp": False},
    "no_residual_pfeiffer": {
        "bottleneck_size": 7,
        "residual": False,
        "layout": "pfeiffer",
        "activation": "sigmoid",
        "layers": [0],
    },
    "reduced": {"bottleneck_size": None, "reduction_factor": 9.5, "activation": "leakyrelu", "scaling": 0.5},
    "one_layer": {"bottleneck_size": 64, "layers": [1], "activation": "swish"},
}


@pytest.fixture(scope="module")
def store(llama, tmp_path_factory):
    store = tmp_path_factory.mktemp("store")
    for seed, (name, options) in enumerate(VARIANTS.items()):
        write_bottleneck(llama, store / "acme" / name / "1", seed=seed, **options)
    write_lora(llama, store / "acme" / "lora" / "1", r=4, target_modules="all-linear")
    return store


@pytest.fixture(scope="module")
def oracle(llama, store):
    return Oracle(llama, {f"acme/{name}": store / "acme" / name / "1" for name in VARIANTS})


def assert_equal(oracle: Oracle, name: str | None, outcome: Outcome) -> None:
    prompt = outcome.request.prompt_ids
    expected, got = oracle.generate(name, prompt, NEW_TOKENS), outcome.result().tokens
    assert got == expected, f"{name}: " + explain(oracle.model(name), prompt, expected, got)


def test_every_variant_alone(llama_base, tokenizer, store, oracle):
    names = [f"acme/{name}" for name in VARIANTS]
    prompt = random_prompt(20, seed=1)
    answers = {tuple(oracle.generate(name, prompt, NEW_TOKENS)) for name in [None, *names]}
    assert len(answers) == len(names) + 1, "each adapter matters"
    with Running(llama_base, tokenizer, store, slots=len(names)) as running:
        for name in names:
            for length in (1, 20, 90):
                outcome = running.generate(
                    random_prompt(length, seed=length), name, max_new_tokens=NEW_TOKENS
                )
                assert_equal(oracle, name, outcome)


@pytest.mark.parametrize("kernels", ["native", "reference"])
def test_all_kinds_in_a_batch_under_pressure(kernels, llama, tokenizer, store, oracle):
    base = Oracle(llama, {})
    lora = Oracle(llama, {"acme/lora": store / "acme" / "lora" / "1"})
    names = [None, "acme/lora", *(f"acme/{name}" for name in VARIANTS)]
    requests = [(name, random_prompt(3 + 7 * i, seed=i)) for i, name in enumerate([*names, *names[::-1]])]
    pressure = {"kv_pages": 140, "page_size": 2, "slots": 5, "max_batch_tokens": 48}
    with Running(prepared(llama, kernels), tokenizer, store, **pressure) as running:
        # Of the base, so that memory alone decides who is preempted, however slowly adapters are loaded.
        plain = [
            running.generate(random_prompt(20, seed=100 + i), max_new_tokens=NEW_TOKENS) for i in range(8)
        ]
        outcomes = running.arrive(
            [partial(running.generate, prompt, name, max_new_tokens=NEW_TOKENS) for name, prompt in requests],
            every=1,
        )
        for outcome in plain:
            outcome.result()
        assert running.engine.stats().preemptions > 0
        assert running.recorder.count("evicted") > 0
    for (name, _), outcome in zip(requests, outcomes, strict=True):
        assert_equal({"acme/lora": lora, None: base}.get(name, oracle), name, outcome)
    for outcome in plain:
        assert_equal(base, None, outcome)


OLMO2 = Olmo2Config(
    vocab_size=300,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    eos_token_id=1,
    pad_token_id=1,
    initializer_range=0.2,
)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3", "olmo2"])
def test_the_places_of_other_families(family, tokenizer, tmp_path):
    """Gemma 2 and OLMo 2 have norms after their sub-layers, OLMo 2 none before."""
    model = tiny_model(FAMILIES.get(family, OLMO2))
    names = ["acme/houlsby", "acme/both_pfeiffer", "acme/both_parallel"]
    for name in names:
        write_bottleneck(model, tmp_path / name / "1", **VARIANTS[name.removeprefix("acme/")])
    oracle = Oracle(model, {name: tmp_path / name / "1" for name in names})
    with Running(prepared(model), tokenizer, tmp_path) as running:
        outcomes = [
            (name, running.generate(random_prompt(length, seed=length), name, max_new_tokens=NEW_TOKENS))
            for name in names
            for length in (1, 30)
        ]
        for name, outcome in outcomes:
            assert_equal(oracle, name, outcome)


def test_scores(llama_base, tokenizer, store, oracle):
    tokens = random_prompt(100, seed=5)
    with Running(llama_base, tokenizer, store, max_batch_tokens=30) as running:
        for name in ("acme/parallel", "acme/no_residual", None):
            with torch.inference_mode():
                logits = oracle.model(name)(input_ids=torch.tensor([tokens])).logits[0]
            expected = logits.log_softmax(-1)[torch.arange(99), list(tokens[1:])]
            got = [entry.logprob for entry in running.score(tokens, name).scored.logprobs]
            torch.testing.assert_close(torch.tensor(got), expected, atol=1e-4, rtol=0)


def test_details_and_metrics_have_the_methods_name(llama_base, tokenizer, store):
    with Running(llama_base, tokenizer, store) as running:
        running.generate(random_prompt(5, seed=1), "acme/no_residual_pfeiffer").result()
        info = running.adapters.get("acme/no_residual_pfeiffer", None)
        details = {name: json.loads(value) for name, value in info.details.items()}
        assert (details["bottleneck_size"], details["layout"], details["layers"]) == (7, "pfeiffer", [0])
        assert info.num_parameters == 2 * (2 * 64 * 7 + 7 + 64)
        assert [record.method for record in running.recorder.requests] == ["bottleneck"]


def test_a_base_without_adapters_calls_nothing_of_them(llama_base, tokenizer, store, monkeypatch):
    """Blocks look for work only in steps that have an adapter in them."""
    with Running(llama_base, tokenizer, store) as running:
        running.generate(random_prompt(5, seed=1), "acme/houlsby").result()

        def fail(*args):
            raise AssertionError("called for a batch of the base alone")

        for block in llama_base.blocks:
            monkeypatch.setattr(block, "deltas", [fail])
        assert len(running.generate(random_prompt(5, seed=1)).result().tokens) == 8


def renamed(tensors: dict[str, torch.Tensor], old: str, new: str) -> dict[str, torch.Tensor]:
    return {name.replace(old, new): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: edit_config(d, activation="mish"), "activation must be one of relu, gelu"),
        (lambda d: edit_config(d, layout="seq"), "layout must be one of houlsby, pfeiffer, parallel"),
        (lambda d: edit_config(d, scaling="learned"), "scaling must be a number.*learned"),
        (lambda d: edit_config(d, residual=None), "residual must be true or false"),
        (
            lambda d: edit_config(d, layout="parallel", residual=False),
            "residual must be true in the parallel",
        ),
        (lambda d: edit_config(d, bottleneck_size=0), "bottleneck_size must be"),
        (lambda d: edit_config(d, bottleneck_size=9), r"mlp_adapter.*: is \[8, 64\]|attention_adapter.*: is"),
        (
            lambda d: edit_config(d, bottleneck_size=None, reduction_factor=0),
            "reduction_factor must be over 0",
        ),
        (lambda d: edit_config(d, bottleneck_size=None, reduction_factor=4), "reduction_factor"),
        (lambda d: edit_config(d, after_mlp=False), "mlp_adapter.*nothing would use it"),
        (lambda d: edit_config(d, after_mlp=False, after_attention=False), "both false"),
        (lambda d: edit_config(d, layers=[0]), "layers.1.*nothing would use it"),
        (lambda d: edit_config(d, layers=[0, 2]), "layers holds 2; the base has layers 0 to 1"),
        (lambda d: edit_config(d, layers=[]), "layers must be"),
        (lambda d: edit_config(d, layers=[-1]), "layers must be"),
        (lambda d: edit_config(d, use_gating=True), "use_gating"),
        (lambda d: edit_config(d, modules_to_save=["lm_head"]), "modules_to_save"),
        (lambda d: edit_tensors(d, lambda t: dict(list(t.items())[1:])), "is missing"),
        (lambda d: edit_tensors(d, lambda t: renamed(t, "layers.1", "layers.7")), "is missing"),
        (lambda d: edit_tensors(d, lambda t: t | {"other": torch.ones(2)}), "tensor other"),
    ],
)
def test_refusals_name_the_field_or_tensor(llama, llama_base, tokenizer, tmp_path, edit, message):
    edit(write_bottleneck(llama, tmp_path / "acme" / "bad" / "1", **VARIANTS["houlsby"]))
    with (
        Running(llama_base, tokenizer, tmp_path) as running,
        pytest.raises(AdapterInvalidError, match=message),
    ):
        running.generate(random_prompt(5, seed=0), "acme/bad").result()


def test_a_size_over_the_limit_is_refused_and_at_the_limit_served(llama, llama_base, tokenizer, tmp_path):
    for size in (256, 257):
        write_bottleneck(llama, tmp_path / "acme" / f"size{size}" / "1", bottleneck_size=size, std=0.02)
    with Running(llama_base, tokenizer, tmp_path) as running:
        assert len(running.generate(random_prompt(5, seed=0), "acme/size256").result().tokens) == 8
        with pytest.raises(AdapterInvalidError, match="size 257 is over this server's limit of 256"):
            running.generate(random_prompt(5, seed=0), "acme/size257").result()


def test_a_base_whose_sub_layers_cannot_be_told_is_refused(llama, tokenizer, tmp_path):
    write_bottleneck(llama, tmp_path / "acme" / "adapter" / "1", bottleneck_size=4)
    model = tiny_model(FAMILIES["llama"])
    for layer in model.model.layers:
        layer.feed, layer.other = layer.mlp, torch.nn.Linear(64, 64)
        mlp = layer.feed
        del layer.mlp
        layer.__dict__["mlp"] = mlp
    refused = pytest.raises(AdapterInvalidError, match="must have one MLP beside its attention; it has feed")
    with Running(prepared(model), tokenizer, tmp_path) as running:
        assert running.generate(random_prompt(5, seed=0)).result().tokens
        with refused:
            running.generate(random_prompt(5, seed=0), "acme/adapter").result()
