"""The merge path against PEFT: merged rows, other rows beside them, and the base bit for bit afterwards."""

import copy
import hashlib
from functools import partial

import pytest
import torch
from hotswap_server.adapters.residency import InUse, Residency
from hotswap_server.core import ServingPath
from hotswap_server.engine.base import prepare_base
from hotswap_server.errors import AdapterInUseError, CapacityError, MergeRefusedError
from hotswap_server.kernels import select_kernels
from peft import PeftModel
from support.adapters import (
    ALL_LINEARS,
    Oracle,
    edit_tensors,
    write_bottleneck,
    write_ia3,
    write_lora,
    write_prefix,
)
from support.models import FAMILIES, explain, generate_greedily, prepared, random_prompt, tiny_model
from support.running import SOON_S, Running, wait_until

NEW_TOKENS = 16


def write_mild_dora(model, directory):
    """With magnitudes as training leaves them, near the norms of the rows; `write_lora` makes wilder ones."""
    path = write_lora(model, directory, seed=3, std=0.1, r=5, use_dora=True, target_modules=ALL_LINEARS)

    def near_the_norms(name, tensor):
        module = name.removeprefix("base_model.model.").removesuffix(".lora_magnitude_vector")
        if module == name.removeprefix("base_model.model."):
            return tensor
        return model.get_submodule(module).weight.norm(dim=1) * (0.8 + 0.4 * torch.rand(len(tensor)))

    edit_tensors(path, lambda tensors: {n: near_the_norms(n, t) for n, t in tensors.items()})


WRITERS = {
    "all": partial(write_lora, r=4, target_modules=ALL_LINEARS),
    "qv": partial(write_lora, seed=1, r=9, target_modules=["q_proj", "v_proj"]),
    "dora": partial(write_lora, seed=2, r=5, use_dora=True, target_modules=ALL_LINEARS),
    "mild": write_mild_dora,
    "houlsby": partial(write_bottleneck, bottleneck_size=8),
    "prefix": partial(write_prefix, tokens=7),
    "ia3": partial(
        write_ia3, target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
}
EVERYBODY = [None, *WRITERS]


class World:
    """A model, its adapters and what PEFT answers with them."""

    def __init__(self, family, store):
        self.store = store
        self.model = tiny_model(FAMILIES[family])
        for name, write in WRITERS.items():
            write(self.model, store / "acme" / name / "1")
        self.base = prepared(self.model)
        # One model each: PEFT does not mix methods in one.
        self.oracles = {
            name: Oracle(self.model, {} if name is None else {"tested": store / "acme" / name / "1"})
            for name in EVERYBODY
        }
        self._known = {}

    def expected(self, name, prompt):
        if (name, prompt) not in self._known:
            oracle = self.oracles[name]
            self._known[name, prompt] = oracle.generate(name and "tested", prompt, NEW_TOKENS)
        return self._known[name, prompt]

    def check(self, name, outcome):
        prompt, got = outcome.request.prompt_ids, outcome.result().tokens
        expected = self.expected(name, prompt)
        reference = self.oracles[name].model(name and "tested")
        assert got == expected, f"{name}: {explain(reference, prompt, expected, got)}"

    def crowd(self, running, *, seed=0):
        """One request of everybody, of different lengths."""
        return [
            (name, running.generate(random_prompt(4 + 9 * i, seed), full(name), max_new_tokens=NEW_TOKENS))
            for i, name in enumerate(EVERYBODY)
        ]


def full(name):
    return None if name is None else f"acme/{name}"


@pytest.fixture(scope="module", params=["llama", "qwen2"])  # without and with biases
def world(request, tmp_path_factory):
    return World(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return World("llama", tmp_path_factory.mktemp("plain"))


def weights_hash(base):
    digest = hashlib.sha256()
    for group in base.projections:
        digest.update(group.projection.weight().numpy().tobytes())
        digest.update(group.base_projection.weight().numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("merged", ["all", "qv", "dora", "mild"])
def test_everybody_is_answered_as_peft_does_while_one_is_merged(world, tokenizer, merged):
    before = weights_hash(world.base)
    with Running(world.base, tokenizer, world.store) as running:
        for name in EVERYBODY[1:]:
            running.adapters.load(full(name), None).result(SOON_S)
        assert running.merge(full(merged)).name == full(merged)
        for name, outcome in world.crowd(running):
            world.check(name, outcome)
            path = ServingPath.BASE if name is None else ServingPath.BATCHED
            assert outcome.finished.path is (ServingPath.MERGED if name == merged else path)
        assert max(step.batch_size for step in running.recorder.steps) > 3
        alone = running.generate(random_prompt(11, seed=9), full(merged), max_new_tokens=NEW_TOKENS)
        world.check(merged, alone)
        world.check(None, running.generate(random_prompt(12, seed=9), max_new_tokens=NEW_TOKENS))
        running.unmerge(full(merged))
        assert weights_hash(world.base) == before
        for name, outcome in world.crowd(running, seed=1):
            world.check(name, outcome)
            assert outcome.finished.path is not ServingPath.MERGED


@pytest.mark.parametrize("name", ["all", "qv", "dora", "mild"])
def test_merged_answers_are_those_of_merge_and_unload(plain, tokenizer, name):
    peft = PeftModel.from_pretrained(copy.deepcopy(plain.model), plain.store / "acme" / name / "1")
    model = peft.merge_and_unload()
    prompt = random_prompt(30, seed=3)
    with Running(plain.base, tokenizer, plain.store) as running:
        running.merge(full(name))
        got = running.generate(prompt, full(name), max_new_tokens=NEW_TOKENS).result().tokens
        scored = running.score(prompt, full(name)).scored
    assert got == generate_greedily(model, prompt, NEW_TOKENS)
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([prompt])).logits[0]
    expected = logits.log_softmax(-1)[torch.arange(29), list(prompt[1:])]
    got = torch.tensor([entry.logprob for entry in scored.logprobs])
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)
    assert scored.path is ServingPath.MERGED


def test_a_hundred_merges_under_load(plain, tokenizer):
    """Merge, replace and unmerge while requests of all methods run; nobody fails, nobody notices."""
    before, order = weights_hash(plain.base), ["all", "dora", "qv", "mild"]
    with Running(plain.base, tokenizer, plain.store) as running:
        outcomes, paths = plain.crowd(running), set()

        def check():
            for name, outcome in outcomes:
                plain.check(name, outcome)
                paths.add(outcome.finished.path)

        for turn in range(100):
            running.merge(full(order[turn % 4]))
            if turn % 2:
                running.unmerge(full(order[turn % 4]))
            if all(outcome.ended for _, outcome in outcomes):
                check()
                outcomes = plain.crowd(running, seed=turn % 3)
        check()
        assert paths == set(ServingPath)
        assert running.recorder.count("merged") == 100
        assert running.recorder.count("unmerged") == 100
        assert plain.base.merged.ref is None
        assert weights_hash(plain.base) == before


def test_requests_in_flight_go_on_over_a_merge_and_over_an_unmerge(plain, tokenizer):
    prompts = [random_prompt(6, seed=seed) for seed in range(4)]
    with Running(plain.base, tokenizer, plain.store) as running:
        running.adapters.load("acme/all", None).result(SOON_S)
        changes = []
        ref = running.adapters.resolve("acme/all", None)
        steps = len(running.recorder.steps)
        running.recorder.after_step[steps + 4].append(lambda: changes.append(running.merges.merge(ref)))
        running.recorder.after_step[steps + 30].append(
            lambda: changes.append(running.merges.unmerge("acme/all"))
        )
        outcomes = [running.generate(p, "acme/all", max_new_tokens=100) for p in prompts]
        expected = [plain.oracles["all"].generate("tested", p, 100) for p in prompts]
        assert [outcome.result().tokens for outcome in outcomes] == expected
        assert [change.result(SOON_S).info.ref for change in changes] == [ref, ref]


def test_no_adapter_kernel_runs_when_all_rows_are_merged_or_base(plain, tokenizer, monkeypatch):
    kernels, calls = plain.base.state.kernels, []
    lora = kernels.lora
    monkeypatch.setattr(kernels, "lora", lambda *args: (calls.append(1), lora(*args)))
    with Running(plain.base, tokenizer, plain.store) as running:
        running.merge("acme/all")
        calls.clear()
        for name in ("acme/all", None):
            running.generate(random_prompt(9, seed=1), name).result()
        assert not calls
        outcomes = [running.generate(random_prompt(9, seed=1), name) for name in ("acme/all", None)]
        for outcome in outcomes:
            outcome.result()
        assert calls


def test_what_is_loaded_while_one_is_merged_sees_the_base(plain, tokenizer):
    """A DoRA's norms are of the base's weights."""
    with Running(plain.base, tokenizer, plain.store) as running:
        running.merge("acme/all")
        plain.check("dora", running.generate(random_prompt(15, 2), "acme/dora", max_new_tokens=NEW_TOKENS))
        for group in plain.base.projections:
            for name in group.names:
                assert torch.equal(group.weight_of(name), plain.model.get_submodule(name).weight)


def test_a_new_version_runs_batched_and_takes_its_place_when_merged(plain, tokenizer, tmp_path):
    for version in (1, 2):
        write_lora(plain.model, tmp_path / f"acme/x/{version}", seed=version, r=3, target_modules=["q_proj"])
    oracles = [Oracle(plain.model, {"tested": tmp_path / f"acme/x/{version}"}) for version in (1, 2)]
    prompt = random_prompt(20, seed=4)
    expected = [oracle.generate("tested", prompt, NEW_TOKENS) for oracle in oracles]
    assert expected[0] != expected[1]
    with Running(plain.base, tokenizer, tmp_path) as running:
        refs = [running.adapters.resolve("acme/x", version) for version in (1, 2)]

        def answers():
            outcomes = [running.generate(prompt, ref, max_new_tokens=NEW_TOKENS) for ref in refs]
            assert [outcome.result().tokens for outcome in outcomes] == expected
            return [outcome.finished.path for outcome in outcomes]

        running.merge("acme/x", 1)
        assert answers() == [ServingPath.MERGED, ServingPath.BATCHED]
        running.merge("acme/x")
        assert running.merges.merged == refs[1]
        assert answers() == [ServingPath.BATCHED, ServingPath.MERGED]
        assert [running.adapters.describe(ref).merged for ref in refs] == [False, True]
        with pytest.raises(MergeRefusedError, match="acme/x@1 is not merged; acme/x@2 is"):
            running.merges.unmerge("acme/x", 1).result(SOON_S)


def test_a_merged_version_keeps_its_slot(plain, tokenizer):
    with Running(plain.base, tokenizer, plain.store, slots=2) as running:
        running.merge("acme/all")
        for name in ("qv", "dora", "qv"):
            plain.check(name, running.generate(random_prompt(5, 1), full(name), max_new_tokens=NEW_TOKENS))
        assert running.adapters.get("acme/all", None).residency is Residency.DEVICE
        for in_use in InUse:
            with pytest.raises(AdapterInUseError, match="is merged; unmerge it first"):
                running.adapters.unload("acme/all", None, in_use=in_use)
        running.merge("acme/qv")
        plain.check("all", running.generate(random_prompt(5, 2), "acme/all", max_new_tokens=NEW_TOKENS))
        running.unmerge("acme/qv")
        assert running.adapters.unload("acme/all", None, in_use=InUse.WAIT).result(SOON_S) == 1
        assert running.adapters.get("acme/all", None).residency is Residency.STORE


def test_merging_twice_and_unmerging_what_is_not_merged(plain, tokenizer):
    with Running(plain.base, tokenizer, plain.store) as running:
        ref = running.merge("acme/qv")
        assert running.merges.merge(ref).result(SOON_S).seconds == 0.0
        assert running.recorder.count("merged") == 1
        running.unmerge("acme/qv")
        with pytest.raises(MergeRefusedError, match=r"acme/qv is not merged$"):
            running.unmerge("acme/qv")


@pytest.mark.parametrize("kernels", ["reference", "onednn"])
def test_with_other_kernels(plain, tokenizer, kernels):
    base = prepared(plain.model, kernels)
    with Running(base, tokenizer, plain.store) as running:
        for name in EVERYBODY[1:]:
            running.adapters.load(full(name), None).result(SOON_S)
        running.merge("acme/mild")
        for name, outcome in plain.crowd(running):
            plain.check(name, outcome)
    assert not any(group.correction for group in base.projections)


@pytest.mark.parametrize("name", ["houlsby", "prefix", "ia3"])
def test_other_methods_are_refused(plain, tokenizer, name):
    with (
        Running(plain.base, tokenizer, plain.store) as running,
        pytest.raises(MergeRefusedError, match="only LoRA is a change of weights"),
    ):
        running.merge(full(name))


def test_a_server_with_one_slot_merges_nothing(plain, tokenizer):
    with (
        Running(plain.base, tokenizer, plain.store, slots=1) as running,
        pytest.raises(CapacityError, match="more --adapter-slots"),
    ):
        running.merge("acme/all")


def test_weights_that_are_not_finite_are_refused(plain, tokenizer, tmp_path):
    path = write_lora(plain.model, tmp_path / "acme/bad/1", r=2, target_modules=["up_proj"])
    edit_tensors(path, lambda tensors: {name: tensor * 1e20 for name, tensor in tensors.items()})
    with Running(plain.base, tokenizer, tmp_path) as running:
        with pytest.raises(MergeRefusedError, match=r"model\.layers\.0\.mlp\.up_proj is not finite"):
            running.merge("acme/bad")
        assert running.merges.merged is None
        assert running.adapters.unload("acme/bad", None, in_use=InUse.REFUSE).result(SOON_S) == 1


@pytest.mark.parametrize("factor", [0.05, 1.0, 1e4, 1e20])
def test_others_are_right_however_large_the_merged_update_is(plain, tokenizer, tmp_path, factor):
    """Whether it is subtracted or, where that would be inaccurate or infinite, left out."""
    path = write_lora(plain.model, tmp_path / "acme/big/1", r=2, target_modules=["up_proj", "v_proj"])
    edit_tensors(path, lambda tensors: {n: t * factor if "lora_B" in n else t for n, t in tensors.items()})
    with Running(plain.base, tokenizer, tmp_path) as running:
        running.merge("acme/big")
        kinds = {type(swap.correction).__name__ for swap in plain.base.merged._merge.swaps}
        assert kinds == ({"_Subtracted"} if factor <= 1 else {"_Recomputed"})
        beside = running.generate(random_prompt(9, seed=1), "acme/big", max_new_tokens=NEW_TOKENS)
        plain.check(None, running.generate(random_prompt(9, seed=2), max_new_tokens=NEW_TOKENS))
        beside.wait()
        assert max(step.batch_size for step in running.recorder.steps) == 2


def test_a_merge_that_fails_midway_changes_nothing(plain, tokenizer, monkeypatch):
    before, kernels = weights_hash(plain.base), plain.base.state.kernels
    make, made = kernels.merged, []

    def fails_later(*args):
        if len(made) == 3:
            raise MemoryError("no room")
        made.append(1)
        return make(*args)

    with Running(plain.base, tokenizer, plain.store) as running:
        running.merge("acme/qv")
        monkeypatch.setattr(kernels, "merged", fails_later)
        with pytest.raises(MemoryError):
            running.merge("acme/all")
        assert running.merges.merged == running.adapters.resolve("acme/qv", None)
        for name, outcome in plain.crowd(running):
            plain.check(name, outcome)
        running.unmerge("acme/qv")
        assert weights_hash(plain.base) == before
        assert running.adapters.unload("acme/all", None, in_use=InUse.REFUSE).result(SOON_S) == 1


def test_merging_takes_one_thread_and_leaves_the_others_theirs(plain, tokenizer):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with Running(plain.base, tokenizer, plain.store) as running:
            assert running.merges._worker.submit(torch.get_num_threads).result(SOON_S) == 1
            assert torch.get_num_threads() == 2
            threads = []
            running.engine.between_steps(lambda: threads.append(torch.get_num_threads())).result(SOON_S)
            assert threads == [2]
    finally:
        torch.set_num_threads(before)


def test_closing_while_one_is_merged_leaves_the_base_bare(plain, tokenizer):
    before = weights_hash(plain.base)
    with Running(plain.base, tokenizer, plain.store) as running:
        running.merge("acme/dora")
        running.generate(random_prompt(5, seed=0), "acme/dora").result()
        wait_until(lambda: running.engine.idle)
    assert weights_hash(plain.base) == before
    assert not any(group.correction for group in plain.base.projections)


def test_in_bfloat16_it_costs_what_merging_costs_in_peft(plain, tokenizer, tmp_path):
    """Log-probabilities of the merged adapter, and of the base beside it, against float32."""
    path = write_lora(plain.model, tmp_path / "acme/x/1", r=4, std=0.05, target_modules=ALL_LINEARS)
    tokens = random_prompt(60, seed=5)

    def logprobs(model):
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([tokens])).logits[0].float()
        return logits.log_softmax(-1)[torch.arange(59), list(tokens[1:])]

    half = copy.deepcopy(plain.model).to(torch.bfloat16)
    exact = {None: logprobs(plain.model), "acme/x": logprobs(Oracle(plain.model, {"t": path}).model("t"))}
    unmerged = logprobs(PeftModel.from_pretrained(copy.deepcopy(half), path).eval())
    merged = logprobs(PeftModel.from_pretrained(copy.deepcopy(half), path).merge_and_unload())

    def spread(got, name):
        return float((got - exact[name]).square().mean().sqrt())

    theirs = max(spread(unmerged, "acme/x"), spread(merged, "acme/x"))
    kernels = select_kernels(torch.device("cpu"), torch.bfloat16)
    with Running(prepare_base(half, kernels=kernels), tokenizer, tmp_path) as running:
        running.merge("acme/x")
        # Both in one step: no step runs while they are submitted.
        begun = running.engine.between_steps(lambda: [(name, running.score(tokens, name)) for name in exact])
        outcomes = begun.result(SOON_S)
        for name, outcome in outcomes:
            got = torch.tensor([entry.logprob for entry in outcome.scored.logprobs])
            assert spread(got, name) <= 1.5 * theirs, name
        assert max(step.batch_size for step in running.recorder.steps) == 2
