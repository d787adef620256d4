"""The engine on a GPU, its layers compiled and its decode steps recorded, against the same on the CPU."""

import copy

import pytest
import torch
from hotswap_server.engine import graphs as graphs_module
from hotswap_server.engine.base import BaseModel, prepare_base
from hotswap_server.engine.compiling import compile_layers
from hotswap_server.kernels import select_kernels
from support.adapters import write_bottleneck, write_ia3, write_lora, write_prefix
from support.models import FAMILIES, prepared, random_prompt, tiny_model
from support.running import Outcome, Running

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

NEW_TOKENS = 24
CUDA = torch.device("cuda")
WRITERS = {
    "lora4": lambda model, path: write_lora(model, path, r=4, target_modules="all-linear"),
    "lora9": lambda model, path: write_lora(model, path, seed=1, r=9, target_modules=["q_proj", "v_proj"]),
    "dora": lambda model, path: write_lora(
        model, path, seed=2, r=5, use_dora=True, target_modules=["q_proj", "down_proj"]
    ),
    "houlsby": lambda model, path: write_bottleneck(model, path, bottleneck_size=8),
    "parallel": lambda model, path: write_bottleneck(
        model, path, seed=1, bottleneck_size=21, layout="parallel", activation="silu", after_mlp=False
    ),
    "pfeiffer": lambda model, path: write_bottleneck(
        model, path, seed=2, bottleneck_size=40, layout="pfeiffer", residual=False, activation="gelu"
    ),
    "prefix7": lambda model, path: write_prefix(model, path, tokens=7),
    "prefix33": lambda model, path: write_prefix(model, path, tokens=33, seed=1),
    "ia3": lambda model, path: write_ia3(
        model,
        path,
        target_modules=["k_proj", "v_proj", "down_proj"],
        feedforward_modules=["down_proj"],
    ),
}
EVERYONE = [None, *WRITERS]


def on_gpu(
    model: torch.nn.Module, dtype: torch.dtype = torch.float32, *, compiled: bool = False
) -> BaseModel:
    base = prepare_base(copy.deepcopy(model).to(CUDA, dtype), kernels=select_kernels(CUDA, dtype))
    if compiled:
        compile_layers(base)
    return base


@pytest.fixture(scope="module")
def store(llama, tmp_path_factory):
    store = tmp_path_factory.mktemp("store")
    for name, write in WRITERS.items():
        write(llama, store / "acme" / name / "1")
    return store


@pytest.fixture(scope="module", params=[False, True], ids=["eager", "compiled"])
def gpu_base(llama, request):
    return on_gpu(llama, compiled=request.param)


def ask(running: Running, name: str | None, length: int, seed: int) -> Outcome:
    adapter = None if name is None else f"acme/{name}"
    return running.generate(random_prompt(length, seed=seed), adapter, max_new_tokens=NEW_TOKENS, logprobs=5)


def assert_same(got: Outcome, expected: Outcome, atol: float = 1e-3) -> None:
    assert got.result().tokens == expected.result().tokens
    for ours, theirs in zip(got.logprobs, expected.logprobs, strict=True):
        assert ours.logprob == pytest.approx(theirs.logprob, abs=atol)
        assert [value for _, value in ours.top] == pytest.approx([v for _, v in theirs.top], abs=atol)


def answers(base: BaseModel, tokenizer, store, *, together: bool, graphs: bool = True) -> list[Outcome]:
    """Of every adapter, once with a short prompt and once with one that takes several chunks."""
    with Running(base, tokenizer, store, max_batch_size=32, max_batch_tokens=64, graphs=graphs) as running:
        wanted = [(name, length) for name in EVERYONE for length in (5, 100)]
        outcomes = []
        for seed, (name, length) in enumerate(wanted):
            outcomes.append(ask(running, name, length, seed))
            if not together:
                outcomes[-1].wait()
        return [outcome.wait() for outcome in outcomes]


@pytest.fixture(scope="module")
def expected(llama, tokenizer, store):
    return answers(prepared(llama), tokenizer, store, together=True)


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("graphs", [True, False])
def test_every_method_and_mix_answers_as_on_the_cpu(gpu_base, tokenizer, store, expected, together, graphs):
    got = answers(gpu_base, tokenizer, store, together=together, graphs=graphs)
    for ours, theirs in zip(got, expected, strict=True):
        assert_same(ours, theirs)


def test_with_room_for_few_graphs_answers_are_the_same(gpu_base, tokenizer, store, expected, monkeypatch):
    monkeypatch.setattr(graphs_module, "_MAX_GRAPHS", 2)
    for ours, theirs in zip(answers(gpu_base, tokenizer, store, together=True), expected, strict=True):
        assert_same(ours, theirs)


def plain_answers(base: BaseModel, tokenizer, store, *, slots: int = 8) -> list[tuple[list[int], object]]:
    """Of requests that want nothing but tokens, many of which end sooner than by their length."""
    with Running(base, tokenizer, store, max_batch_size=12, max_batch_tokens=64, slots=slots) as running:
        outcomes = []
        for seed in range(60):
            ends = random_prompt(12, seed=1000 + seed)
            name, prompt = EVERYONE[seed % len(EVERYONE)], random_prompt(3 + seed, seed=seed)
            adapter = None if name is None else f"acme/{name}"
            outcomes.append(running.generate(prompt, adapter, max_new_tokens=1 + seed, stop_token_ids=ends))
        return [(outcome.result().tokens, outcome.finished.finish_reason) for outcome in outcomes]


@pytest.mark.parametrize("slots", [8, 1])
def test_steps_ahead_and_slots_filled_beside_them_answer_as_on_the_cpu(
    gpu_base, llama, tokenizer, store, slots
):
    expected = plain_answers(prepared(llama), tokenizer, store)
    assert plain_answers(gpu_base, tokenizer, store, slots=slots) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_answers_as_on_the_cpu(family, tokenizer, tmp_path):
    model = tiny_model(FAMILIES[family])
    write_lora(model, tmp_path / "acme" / "lora4" / "1", r=4, target_modules="all-linear")
    both = []
    for base in (prepared(model), on_gpu(model, compiled=True)):
        with Running(base, tokenizer, tmp_path) as running:
            outcomes = [ask(running, name, length, length) for name in (None, "lora4") for length in (3, 60)]
            both.append([outcome.wait() for outcome in outcomes])
    for theirs, ours in zip(*both, strict=True):
        assert_same(ours, theirs)
