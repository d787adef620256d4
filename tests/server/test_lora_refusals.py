"""Checkpoints that cannot be served as they are meant are refused, by the name of what is wrong."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hotswap_server.errors import AdapterInvalidError
from support.adapters import ALL_LINEARS, edit_config, edit_tensors, write_lora
from support.models import random_prompt
from support.running import Running

PREFIX = "base_model.model.model.layers.0.self_attn"
Q_A, Q_B = f"{PREFIX}.q_proj.lora_A.weight", f"{PREFIX}.q_proj.lora_B.weight"
PROMPT = random_prompt(12, seed=0)

Edit = Callable[[Path], None]


def fields(**values: object) -> Edit:
    return lambda directory: edit_config(directory, **values)


def added(name: str, *shape: int) -> Edit:
    return lambda directory: edit_tensors(directory, lambda tensors: tensors | {name: torch.ones(shape)})


def replaced(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Edit:
    return lambda directory: edit_tensors(directory, lambda tensors: tensors | {name: change(tensors[name])})


def without(*names: str) -> Edit:
    return lambda directory: edit_tensors(
        directory, lambda tensors: {name: t for name, t in tensors.items() if name not in names}
    )


def with_nan(tensor: torch.Tensor) -> torch.Tensor:
    tensor[1, 2] = torch.nan
    return tensor


REFUSED: dict[str, tuple[Edit, str]] = {
    "dora_field": (fields(use_dora=True), "for which there are no tensors"),
    "dora_tensor": (
        added(f"{PREFIX}.q_proj.lora_magnitude_vector", 64),
        "lora_magnitude_vector: is of a DoRA",
    ),
    "modules_to_save_field": (
        fields(modules_to_save=["lm_head"]),
        r"modules_to_save \['lm_head'\] is not served.*target_modules instead",
    ),
    "modules_to_save_tensor": (
        added("base_model.model.lm_head.modules_to_save.weight", 300, 64),
        "lm_head.modules_to_save.weight: modules_to_save",
    ),
    "saved_head": (
        added("base_model.model.lm_head.weight", 300, 64),
        "tensor base_model.model.lm_head.weight",
    ),
    "embedding_tensor": (
        added("base_model.model.model.embed_tokens.lora_embedding_A", 4, 300),
        "embed_tokens.lora_embedding_A: its partner .lora_embedding_B is missing",
    ),
    "embedding_target": (
        fields(target_modules=["q_proj", "v_proj", "embed_tokens"]),
        "targets model.embed_tokens",
    ),
    "lm_head_target": (fields(target_modules=["q_proj", "v_proj", "lm_head"]), "lm_head"),
    "trainable_tokens": (fields(trainable_token_indices=[1, 2]), "trainable_token_indices"),
    "bias_field": (fields(bias="some"), "bias must be one of none, all, lora_only, got 'some'"),
    "bias_tensor": (added(f"{PREFIX}.q_proj.bias", 64), f"tensor {PREFIX}.q_proj.bias"),
    "lora_bias_field": (fields(lora_bias=True), r"lora_B.bias: is missing.*lora_bias"),
    "lora_bias_tensor": (
        added(f"{PREFIX}.q_proj.lora_B.bias", 64),
        r"q_proj.lora_B.bias: .*lora_bias.* has no place",
    ),
    "unknown_field": (fields(use_quux=0.5), "use_quux = 0.5"),
    "layer_replication": (fields(layer_replication=[[0, 1], [0, 2]]), "layer_replication"),
    "alora": (fields(alora_invocation_tokens=[5]), "alora_invocation_tokens"),
    "target_parameters": (fields(target_parameters=["experts.w"]), "target_parameters"),
    "fan_in_fan_out": (fields(fan_in_fan_out=True), "fan_in_fan_out"),
    "qalora": (fields(use_qalora=True), "use_qalora"),
    "pissa": (fields(init_lora_weights="pissa_niter_4"), "init_lora_weights 'pissa_niter_4'"),
    "olora": (fields(init_lora_weights="olora"), "init_lora_weights 'olora'"),
    "task": (fields(task_type="SEQ_CLS"), "task_type 'SEQ_CLS'"),
    "peft_type": (fields(peft_type="LOHA"), "peft_type 'LOHA' is not served"),
    "prompt_tuning": (
        fields(peft_type="PROMPT_TUNING"),
        "'PROMPT_TUNING' is not served; train with one that is: .*PREFIX_TUNING",
    ),
    "unused_tensor": (added("base_model.model.extra.weight", 3), "tensor base_model.model.extra.weight"),
    "unused_module": (
        lambda directory: edit_config(directory, target_modules=["q_proj"]),
        r"v_proj.lora_A.weight: its module is no target",
    ),
    "module_of_no_layer": (
        lambda directory: edit_tensors(
            directory,
            lambda tensors: {name.replace("layers.1", "layers.7"): t for name, t in tensors.items()},
        ),
        r"layers.1.self_attn.q_proj .* no tensors",
    ),
    "target_without_tensors": (without(Q_A, Q_B), r"layers.0.self_attn.q_proj \(1 modules\).*no tensors"),
    "missing_a": (without(Q_A), r"q_proj.lora_B.weight: its partner .lora_A.weight is missing"),
    "missing_b": (without(Q_B), r"q_proj.lora_A.weight: its partner .lora_B.weight is missing"),
    "wrong_a": (replaced(Q_A, lambda t: t[:, :-1]), r"q_proj.lora_A.weight: is \[4, 63\].*\[rank, 64\]"),
    "wrong_b": (replaced(Q_B, lambda t: t[:-1]), r"q_proj.lora_B.weight: is \[63, 4\].*\[64, 4\]"),
    "transposed_b": (replaced(Q_B, lambda t: t.t()), r"q_proj.lora_B.weight: is \[4, 64\]"),
    "flat_a": (replaced(Q_A, torch.flatten), r"q_proj.lora_A.weight: is \[256\]"),
    "rank_of_the_field": (fields(r=8), r"lora_A.weight: has rank 4.*says 8"),
    "rank_of_the_pattern": (fields(rank_pattern={"q_proj": 5}), r"q_proj.lora_A.weight: has rank 4.*says 5"),
    "rank_pattern_no_number": (fields(rank_pattern={"q_proj": "4"}), "rank_pattern must be a number"),
    "rank_pattern_no_object": (fields(rank_pattern=[4]), "rank_pattern must be an object"),
    "alpha_pattern_no_regex": (fields(alpha_pattern={"(": 4}), "alpha_pattern holds"),
    "no_r": (fields(r=None), "r must be a number over 0"),
    "no_alpha": (fields(lora_alpha=0), "lora_alpha must be a number over 0"),
    "target_that_matches_nothing": (
        fields(target_modules=["q_proj", "v_proj", "wqkv"]),
        "target_modules wqkv",
    ),
    "pattern_that_matches_nothing": (fields(target_modules=r".*\.wqkv"), "select no linear layer"),
    "target_is_no_regex": (fields(target_modules="*"), "target_modules holds"),
    "no_targets": (fields(target_modules=None), "target_modules is empty"),
    "targets_of_the_wrong_type": (fields(target_modules=[1]), "target_modules must be"),
    "layers_beyond_the_base": (fields(layers_to_transform=[9]), "select no linear layer"),
    "layers_of_the_wrong_type": (fields(layers_to_transform=["1"]), "layers_to_transform must be"),
    "everything_excluded": (fields(exclude_modules=["q_proj", "v_proj"]), "select no linear layer"),
    "nan": (replaced(Q_A, with_nan), "q_proj.lora_A.weight' holds NaN"),
    "infinity": (replaced(Q_B, lambda t: t / 0), "q_proj.lora_B.weight' holds"),
}


@pytest.fixture(scope="module")
def template(llama, tmp_path_factory):
    """Three adapters: one to damage, one that goes on, and one of a rank over the limit."""
    store = tmp_path_factory.mktemp("refusals")
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    write_lora(llama, store / "acme" / "good" / "1", **options)
    write_lora(llama, store / "acme" / "large" / "1", **options | {"r": 17})
    source = write_lora(llama, tmp_path_factory.mktemp("template"), seed=1, **options)
    return store, {file.name: file.read_bytes() for file in source.iterdir()}


@pytest.fixture(scope="module")
def running(llama_base, tokenizer, template):
    store, files = template
    for name, (edit, _) in REFUSED.items():
        directory = store / "acme" / name / "1"
        directory.mkdir(parents=True)
        for file, content in files.items():
            (directory / file).write_bytes(content)
        edit(directory)
    with Running(llama_base, tokenizer, store, max_rank=16, slots=2) as running:
        yield running


@pytest.fixture(scope="module")
def answers(running):
    return {
        name: running.generate(PROMPT, name, max_new_tokens=12).result().tokens
        for name in (None, "acme/good")
    }


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name_and_the_others_go_on(name, running, answers):
    others = {user: running.generate(PROMPT, user, max_new_tokens=12) for user in answers}
    with pytest.raises(AdapterInvalidError, match=REFUSED[name][1]):
        running.generate(PROMPT, f"acme/{name}").result()
    others |= {(user, "after"): running.generate(PROMPT, user, max_new_tokens=12) for user in answers}
    for key, outcome in others.items():
        user = key[0] if isinstance(key, tuple) else key
        assert outcome.result().tokens == answers[user]
    running.assert_clean()


def test_a_rank_over_the_limit_is_refused_with_the_remedy(running):
    with pytest.raises(
        AdapterInvalidError, match=r"rank 17 is over this server's limit of 16.*max_lora_rank"
    ):
        running.generate(PROMPT, "acme/large").result()


def test_what_peft_writes_without_asking_is_served(llama, llama_base, tokenizer, tmp_path):
    """All fields at their defaults, and those without an effect at other values."""
    directory = write_lora(llama, tmp_path / "acme" / "plain" / "1", r=2, target_modules=ALL_LINEARS)
    edit_config(
        directory,
        lora_dropout=0.1,
        init_lora_weights="gaussian",
        base_model_name_or_path="elsewhere",
        peft_version="0.0.1",
        revision="main",
    )
    with Running(llama_base, tokenizer, tmp_path) as running:
        running.generate(PROMPT, "acme/plain").result()
