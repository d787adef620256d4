"""LoRA beside the decoder's linears against PEFT: on the embedding and the head, and with biases."""

import copy
from functools import partial

import pytest
import torch
from hotswap_server.core import ServingPath
from hotswap_server.errors import MergeRefusedError
from support.adapters import ALL_LINEARS, Oracle, write_bottleneck, write_ia3, write_lora, write_prefix
from support.models import FAMILIES, SHAPE, explain, prepared, random_prompt, tiny_model
from support.running import Running
from transformers import LlamaConfig, PhiConfig, PreTrainedConfig, Starcoder2Config

NEW_TOKENS = 12
BASES: dict[str, PreTrainedConfig] = {
    "llama": FAMILIES["llama"],
    "tied": LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "biased": LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True),
    "qwen2": FAMILIES["qwen2"],
    "gemma": FAMILIES["gemma"],
    # Norms with biases, and an output embedding with one.
    "starcoder2": Starcoder2Config(**SHAPE, tie_word_embeddings=False),
    "phi": PhiConfig(**SHAPE),
}
EMBEDDINGS = {
    "embedding": {"r": 4, "lora_alpha": 9, "target_modules": ["embed_tokens"]},
    "head": {"r": 5, "lora_alpha": 3, "target_modules": ["lm_head"]},
    "all": {
        "r": 4,
        "lora_alpha": 4,
        "use_rslora": True,
        "target_modules": ["q_proj", "v_proj", "embed_tokens", "lm_head"],
        "rank_pattern": {"lm_head": 6},
        "alpha_pattern": {"embed_tokens": 3},
    },
    "dora": {"r": 3, "lora_alpha": 5, "use_dora": True, "target_modules": r".*(embed_tokens|lm_head|q_proj)"},
    "tied": {
        "r": 4,
        "lora_alpha": 2,
        "target_modules": ["embed_tokens", "q_proj"],
        "ensure_weight_tying": True,
    },
    "own_biases": {"r": 4, "lora_alpha": 6, "target_modules": ["lm_head", "k_proj"], "lora_bias": True},
}
BIASES = {
    "all_biases": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "bias": "all"},
    "adapted_biases": {
        "r": 3,
        "lora_alpha": 3,
        "target_modules": ["q_proj", "v_proj", "lm_head"],
        "bias": "lora_only",
    },
    "dora_biases": {"r": 2, "target_modules": ["k_proj", "v_proj"], "use_dora": True, "bias": "all"},
    "both_biases": {"r": 2, "target_modules": ["v_proj", "lm_head"], "lora_bias": True, "bias": "all"},
}
PLAIN = {"plain": {"r": 7, "lora_alpha": 7, "target_modules": ["q_proj", "v_proj"]}}
CASES = {
    "llama": {name: EMBEDDINGS[name] for name in ("embedding", "head", "all", "dora")},
    "tied": EMBEDDINGS,
    "biased": BIASES,
    "qwen2": {name: EMBEDDINGS[name] for name in ("dora", "own_biases")} | BIASES,
    "gemma": {name: EMBEDDINGS[name] for name in ("embedding", "dora", "tied")},
    "starcoder2": {name: BIASES[name] for name in ("all_biases", "dora_biases")},
    "phi": BIASES | {"dora": EMBEDDINGS["dora"]},
}


class Setting:
    """A base, its adapters in a store, and what PEFT says under each of them."""

    def __init__(self, base, directory, adapters):
        self.model = tiny_model(copy.deepcopy(base))
        self.store = directory
        self.names = [None, *adapters]
        self._answers = {}
        for seed, (name, options) in enumerate(adapters.items()):
            write = partial(write_lora, **options) if isinstance(options, dict) else options
            write(self.model, directory / "acme" / name / "1", seed=seed)
        self._oracles = {}

    def oracle(self, name):
        if name not in self._oracles:
            directories = {} if name is None else {f"acme/{name}": self.store / "acme" / name / "1"}
            self._oracles[name] = Oracle(self.model, directories)
        return self._oracles[name]

    def reference(self, name):
        return self.oracle(name).model(full_name(name))

    def expected(self, name, prompt):
        if (name, prompt) not in self._answers:
            self._answers[name, prompt] = self.oracle(name).generate(full_name(name), prompt, NEW_TOKENS)
        return self._answers[name, prompt]

    def assert_equal(self, name, outcome):
        prompt = outcome.request.prompt_ids
        expected, got = self.expected(name, prompt), outcome.result().tokens
        assert got == expected, f"{name}: " + explain(self.reference(name), prompt, expected, got)


def full_name(name):
    return None if name is None else f"acme/{name}"


def start(running, name, prompt):
    return running.generate(prompt, full_name(name), max_new_tokens=NEW_TOKENS)


@pytest.mark.parametrize("base", BASES)
def test_equals_peft_alone_and_in_a_crowd(base, tokenizer, tmp_path):
    setting = Setting(BASES[base], tmp_path, CASES[base] | PLAIN)
    prompt = random_prompt(9, seed=0)
    answers = {name: tuple(setting.expected(name, prompt)) for name in setting.names}
    assert len(set(answers.values())) == len(answers)
    with Running(prepared(setting.model), tokenizer, tmp_path, slots=2, max_batch_tokens=24) as running:
        for name in setting.names:
            setting.assert_equal(name, start(running, name, prompt))
        prompts = [random_prompt(3 + 7 * index, seed=index) for index in range(len(setting.names))]
        crowd = [start(running, name, p) for name, p in zip(setting.names, prompts, strict=True)]
        for name, outcome in zip(setting.names, crowd, strict=True):
            setting.assert_equal(name, outcome)
        assert running.recorder.count("evicted") > 0
        assert any(s.num_prefill_tokens and s.num_decode_tokens for s in running.recorder.steps)


@pytest.mark.parametrize("base", ["tied", "qwen2"])
def test_scores_and_logprobs(base, tokenizer, tmp_path):
    setting = Setting(BASES[base], tmp_path, CASES[base])
    tokens = random_prompt(70, seed=5)
    with Running(prepared(setting.model), tokenizer, tmp_path, slots=12, max_batch_tokens=48) as running:
        outcomes = [(name, running.score(tokens, full_name(name), score_from=9)) for name in setting.names]
        generated = [
            (name, running.generate(tokens[:20], full_name(name), max_new_tokens=6, logprobs=3))
            for name in setting.names
        ]
        for name, outcome in outcomes:
            with torch.inference_mode():
                logits = setting.reference(name)(input_ids=torch.tensor([tokens])).logits[0]
            expected = logits.log_softmax(-1)[torch.arange(8, 69), list(tokens[9:])]
            got = torch.tensor([entry.logprob for entry in outcome.scored.logprobs])
            torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)
        for name, outcome in generated:
            ids = [*tokens[:20], *outcome.result().tokens]
            with torch.inference_mode():
                logits = setting.reference(name)(input_ids=torch.tensor([ids])).logits[0, 19:-1]
            expected = logits.log_softmax(-1).topk(3).values
            got = torch.tensor([[logprob for _, logprob in entry.top] for entry in outcome.logprobs])
            torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


def test_every_method_in_one_batch_under_pressure(tokenizer, tmp_path):
    """A base with biases: chunked prefill, preemption and eviction, beside the other methods."""
    others = {
        "houlsby": partial(write_bottleneck, bottleneck_size=8),
        "prefix": partial(write_prefix, tokens=7),
        "ia3": partial(
            write_ia3, target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
        ),
    }
    loras = {"all": EMBEDDINGS["all"], "dora": EMBEDDINGS["dora"]} | BIASES | PLAIN
    setting = Setting(BASES["qwen2"], tmp_path, loras | others)
    pressure = {"kv_pages": 130, "page_size": 2, "slots": 2, "max_batch_tokens": 40}
    with Running(prepared(setting.model), tokenizer, tmp_path, **pressure) as running:
        plain = [start(running, None, random_prompt(30, seed=100 + index)) for index in range(6)]
        again = [*setting.names, *setting.names[:4]]
        arrivals = [
            partial(start, running, name, random_prompt(1 + 17 * index % 60, seed=index))
            for index, name in enumerate(again)
        ]
        outcomes = running.arrive(arrivals, every=1)
        for outcome in plain:
            setting.assert_equal(None, outcome)
        for name, outcome in zip(again, outcomes, strict=True):
            setting.assert_equal(name, outcome)
        assert running.engine.stats().preemptions > 0
        assert running.recorder.count("evicted") > 0
        assert max(step.distinct_adapters for step in running.recorder.steps) > 1


def test_a_slot_shows_nothing_of_who_had_it_before(tokenizer, tmp_path):
    setting = Setting(BASES["qwen2"], tmp_path, EMBEDDINGS | BIASES | PLAIN)
    prompt = random_prompt(15, seed=3)
    rich, order = ("both_biases", "dora", "all", "own_biases"), []
    for name in rich:
        order += [name, "plain", name, "embedding", "head"]
    with Running(prepared(setting.model), tokenizer, tmp_path, slots=1) as running:
        for name in order:
            outcome = start(running, name, prompt)
            base = start(running, None, prompt)
            setting.assert_equal(name, outcome)
            setting.assert_equal(None, base)


MERGEABLE = {
    "tied": {name: EMBEDDINGS[name] for name in ("head", "own_biases")} | PLAIN,
    "biased": {name: BIASES[name] for name in ("adapted_biases", "dora_biases")},
    "qwen2": {"head": EMBEDDINGS["head"], "both_biases": BIASES["both_biases"]},
}


@pytest.mark.parametrize("base", MERGEABLE)
def test_everybody_is_right_while_a_head_or_biases_are_merged(base, tokenizer, tmp_path):
    """The head's weight may be the embedding's, which stays what it is."""
    setting = Setting(BASES[base], tmp_path, MERGEABLE[base] | {"embedding": EMBEDDINGS["embedding"]})
    prepared_base = prepared(setting.model)
    with Running(prepared_base, tokenizer, tmp_path, slots=len(setting.names)) as running:
        for merged in MERGEABLE[base]:
            running.merge(f"acme/{merged}")
            crowd = [
                (name, start(running, name, random_prompt(3 + 7 * index, seed=index)))
                for index, name in enumerate(setting.names)
            ]
            for name, outcome in crowd:
                setting.assert_equal(name, outcome)
                assert (outcome.finished.path is ServingPath.MERGED) == (name == merged)
            setting.assert_equal(merged, start(running, merged, random_prompt(8, seed=9)))
        running.unmerge(f"acme/{merged}")
        for name in setting.names:
            setting.assert_equal(name, start(running, name, random_prompt(8, seed=7)))
    for group in prepared_base.groups:
        for name in group.names:
            assert torch.equal(group.weight_of(name), setting.model.get_submodule(name).weight)


@pytest.mark.parametrize(
    ("base", "adapter", "problem"),
    [
        ("tied", "embedding", "model.embed_tokens"),
        ("llama", "all", "model.embed_tokens"),
        ("starcoder2", "all_biases", "layernorm"),
    ],
)
def test_what_is_no_linear_layer_is_not_merged(base, adapter, problem, tokenizer, tmp_path):
    setting = Setting(BASES[base], tmp_path, {adapter: (EMBEDDINGS | BIASES)[adapter]})
    with Running(prepared(setting.model), tokenizer, tmp_path) as running:
        with pytest.raises(MergeRefusedError, match=problem):
            running.merge(f"acme/{adapter}")
        setting.assert_equal(adapter, start(running, adapter, random_prompt(8, seed=1)))


@pytest.mark.parametrize("kernels", ["reference", "onednn"])
def test_other_kernels_agree(kernels, tokenizer, tmp_path):
    setting = Setting(BASES["qwen2"], tmp_path, {"all": EMBEDDINGS["all"], **BIASES})
    with Running(prepared(setting.model, kernels), tokenizer, tmp_path, max_batch_tokens=24) as running:
        crowd = [
            (name, start(running, name, random_prompt(3 + 7 * index, seed=index)))
            for index, name in enumerate(setting.names)
        ]
        for name, outcome in crowd:
            setting.assert_equal(name, outcome)


def test_in_bfloat16_logits_are_near_peft_s(tokenizer, tmp_path):
    """As near as rounding of the same weights in another order leaves them."""
    adapters = {name: EMBEDDINGS[name] | {"std": 0.1} for name in ("all", "dora")}
    setting = Setting(BASES["gemma"], tmp_path, adapters)
    setting.model.bfloat16()
    base = prepared(setting.model, "reference")
    tokens = random_prompt(30, seed=2)
    with Running(base, tokenizer, tmp_path) as running:
        for name in setting.names:
            with torch.inference_mode():
                logits = setting.reference(name)(input_ids=torch.tensor([tokens])).logits[0]
            expected = logits.float().log_softmax(-1)[torch.arange(29), list(tokens[1:])]
            scored = running.score(tokens, full_name(name)).scored
            got = torch.tensor([entry.logprob for entry in scored.logprobs])
            error = float((got - expected).abs().max() / expected.abs().max())
            assert error < 0.05, (name, error)


class Counting:
    """Kernels that count the calls of `lora`."""

    def __init__(self, kernels):
        self._kernels = kernels
        self.calls = 0

    def __getattr__(self, name):
        return getattr(self._kernels, name)

    def lora(self, *args):
        self.calls += 1
        self._kernels.lora(*args)


def test_others_do_not_pay(tokenizer, tmp_path, monkeypatch):
    """Neither the base nor another LoRA runs anything for places that none of the batch's adapters has."""
    rich = {name: (EMBEDDINGS | BIASES)[name] for name in ("embedding", "head", "dora", "both_biases")}
    setting = Setting(BASES["qwen2"], tmp_path, rich | PLAIN)
    base = prepared(setting.model)
    counting = Counting(base.state.kernels)
    monkeypatch.setattr(base.state, "kernels", counting)
    prompt = random_prompt(5, seed=1)

    def calls(name):
        before = counting.calls
        start(running, name, prompt).result()
        return counting.calls - before

    with Running(base, tokenizer, tmp_path, slots=len(setting.names)) as running:
        alone = calls("plain")
        assert alone == 2 * NEW_TOKENS  # the group of q, k and v in each layer
        for name in setting.names[1:]:
            start(running, name, prompt).result()
        assert calls("plain") == alone
        assert calls(None) == 0
        assert calls("head") == calls("embedding") == NEW_TOKENS
        tables = [delta for group in base.groups for delta in group.deltas]
        assert len(tables) > 1
        touched = []
        monkeypatch.setattr(
            "hotswap_server.adapters.scales.FeatureTable.rows",
            lambda table, slots: touched.append(not table.touched.isdisjoint(slots.used)),
        )
        start(running, "plain", prompt).result()
        assert touched
        assert not any(touched)


def test_a_closed_manager_leaves_the_base_bare(tokenizer, tmp_path):
    setting = Setting(
        BASES["starcoder2"],
        tmp_path,
        {"every": BIASES["all_biases"] | {"target_modules": [*ALL_LINEARS[:4], "embed_tokens", "lm_head"]}},
    )
    base = prepared(setting.model)
    places = (*base.groups, *base.biased, base.embedding)
    with Running(base, tokenizer, tmp_path) as running:
        running.adapters.load("acme/every", None).result()
        assert all(place.deltas for place in places)
    assert not any(place.deltas for place in places)
