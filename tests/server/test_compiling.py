"""Layers behind the compiler's front: what it does not look into must still be what the step does."""

import copy
import dataclasses
import io
import sys

import numpy as np
import pytest
import torch
from hotswap_server.engine import graphs as graphs_module
from hotswap_server.engine.attention import StepState
from hotswap_server.engine.base import prepare_base
from hotswap_server.engine.buffers import Prompts, StepBuffers, empty_inputs
from hotswap_server.engine.compiling import compile_layers, compile_no_more
from hotswap_server.engine.graphs import graph_sizes, prompt_sizes, record_sizes
from hotswap_server.engine.merging import MergedWeights
from hotswap_server.kernels import select_kernels
from hotswap_server.progress import recording_progress
from structlog.testing import capture_logs
from support.adapters import write_bottleneck, write_lora
from support.models import FAMILIES, prepared, random_prompt, tiny_model
from support.running import Running

CPU = torch.device("cpu")


def answers(base, tokenizer, store) -> list[list[int]]:
    names = [None, "acme/lora", "acme/bottleneck"]
    with Running(base, tokenizer, store, max_batch_tokens=48) as running:
        # One kind of step after another, so that none waits for all of them to be compiled.
        for name in names:
            for length in (1, 7):
                running.generate(random_prompt(length, seed=0), name, max_new_tokens=1).result()
        outcomes = [
            running.generate(random_prompt(length, seed=length), name, max_new_tokens=6)
            for name in names
            for length in (1, 7, 60)
        ]
        return [outcome.result().tokens for outcome in outcomes]


@pytest.mark.parametrize(
    ("family", "kernels"),
    [("llama", "auto"), ("llama", "reference"), pytest.param("gemma2", "auto", marks=pytest.mark.slow)],
)
def test_compiled_layers_give_the_same_and_are_compiled_once_for_all(family, kernels, tokenizer, tmp_path):
    config = copy.deepcopy(FAMILIES[family])
    config.num_hidden_layers = 3 if family == "llama" else 4
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types * 2
    model = tiny_model(config)
    write_lora(model, tmp_path / "acme" / "lora" / "1", r=3, target_modules="all-linear")
    write_bottleneck(model, tmp_path / "acme" / "bottleneck" / "1", bottleneck_size=5)
    expected = answers(prepared(model), tokenizer, tmp_path)
    base = prepared(model, kernels)
    compiled = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        compiled.append(graph)
        return graph

    torch.compiler.reset()
    compile_layers(base, backend=backend)
    try:
        assert answers(base, tokenizer, tmp_path) == expected
    finally:
        torch.compiler.reset()
    kinds = 2 if family == "gemma2" else 1
    # One token or many, blocks adapted or not; and the last norm for one or many.
    assert len(compiled) <= kinds * 4 + 2


def test_paths_tell_what_slots_touch(llama):
    state = StepState(select_kernels(CPU, torch.float32))
    state.mark("lora", 0, {"q", "v"})
    state.mark("lora", 1, {"v", "q"})
    state.mark("lora", 2, {"down"})
    state.mark("lora", 3, {"q", "v", "down"})
    assert state.path("lora", {0}) == state.path("lora", {1}) == state.path("lora", {0, 1})
    assert state.path("lora", {2}) != state.path("lora", {0})
    assert state.path("lora", {0, 2}) == state.path("lora", {3}) == state.path("lora", {1, 3})
    assert state.path("prefix", {0}) is None
    state.mark("lora", 0, {"down"})
    assert state.path("lora", {0}) == state.path("lora", {2})


def test_graph_sizes():
    assert graph_sizes(1) == [1]
    assert graph_sizes(6) == [1, 2, 4, 6]
    assert graph_sizes(64) == [1, 2, 4, *range(8, 65, 8)]
    assert graph_sizes(200)[-4:] == [128, 160, 192, 200]
    assert prompt_sizes(48) == [48]
    assert prompt_sizes(64) == [64]
    assert prompt_sizes(200) == [64, 128, 192, 200]
    assert prompt_sizes(8192)[-2:] == [768, 1024]


def test_buffers_pad_what_they_are_filled_with():
    buffers = StepBuffers(max_sequences=8, max_pages=2, device=CPU)
    buffers.turn()[:3] = [[4, 0], [5, 6], [7, 0]]
    row = np.arange(3)
    inputs = buffers.fill(
        4,
        ids=row + 10,
        positions=row + 20,
        pages=row + 4,
        offsets=row,
        context=row + 21,
        slots={"lora": np.array([2, 2, -1], np.int32)},
    )
    assert inputs.input_ids.tolist() == [[10, 11, 12, 0]]
    assert inputs.position_ids.tolist() == [[20, 21, 22, 0]]
    assert inputs.layout.token_pages.tolist() == [4, 5, 6, -1]
    assert inputs.layout.context.tolist() == [21, 22, 23, 0]
    assert inputs.layout.block_table[:3].tolist() == [[4, 0], [5, 6], [7, 0]]
    slots = inputs.slots["lora"]
    assert (slots.index.tolist(), slots.used) == ([2, 2, -1, -1], {2})
    assert slots.tiles is not None
    assert slots.tiles.tolist() == [[0, 2, 2]]
    empty = empty_inputs(buffers, 2)
    assert empty.layout.token_pages.tolist() == [-1, -1]
    assert empty.layout.context.tolist() == [0, 0]


def test_buffers_of_steps_with_prompts():
    """Two decode, one prompt of three tokens joins, and all but the first want logits."""
    buffers = StepBuffers(max_sequences=4, max_pages=2, device=CPU, max_tokens=80)
    buffers.turn()[:3] = [[4, 0], [5, 6], [7, 0]]
    token = np.arange(5)
    inputs = buffers.fill(
        70,
        ids=token + 10,
        positions=token + 20,
        pages=token + 4,
        offsets=token,
        context=np.array([21, 22, 3]),
        slots={"lora": np.array([2, -1, 1, 1, 1], np.int32)},
        chosen={1: 3},
        prompts=Prompts(np.array([[2, 2, 3, 0]], np.int32), 2, np.array([1, 4])),
    )
    assert (inputs.size, inputs.used) == (70, 2)
    assert inputs.input_ids[0, :6].tolist() == [10, 11, 12, 13, 14, 0]
    assert inputs.layout.token_pages[3:].tolist() == [7, 8, *[-1] * 65]
    assert inputs.layout.context.tolist() == [21, 22, 0, 0]
    assert inputs.layout.block_table[:3].tolist() == [[4, 0], [5, 6], [7, 0]]
    assert inputs.layout.prompts is not None
    assert inputs.layout.prompts.tolist() == [[2, 2, 3, 0], *[[0, 0, 0, 0]] * 8]
    assert inputs.logit_rows is not None
    assert inputs.logit_rows.tolist() == [1, 4, 0, 0]
    buffers.chosen.copy_(torch.tensor([7, 8, 9, 99]))
    assert inputs.flat[inputs.sources][:6].tolist() == [10, 99, 12, 13, 14, 0]
    slots = inputs.slots["lora"]
    assert slots.index.tolist() == [2, -1, 1, 1, 1, *[-1] * 65]
    assert slots.tiles is not None
    assert (slots.tile_rows, slots.tiles.tolist()) == (16, [[0, 1, 2], [2, 3, 1], *[[0, 0, 0]] * 6])
    at_logits = slots.at(inputs.logit_rows)
    assert at_logits.tiles is not None
    assert at_logits.index.tolist() == [-1, 1, -1, -1]
    assert (at_logits.tile_rows, at_logits.tiles.tolist()) == (4, [[1, 1, 1], *[[0, 0, 0]] * 3])
    empty = empty_inputs(buffers, 64, prompts=True)
    assert (empty.used, empty.layout.token_pages.tolist()) == (0, [-1] * 64)


class Replayed:
    """A graph that counts."""

    def __init__(self) -> None:
        self.times = 0

    def replay(self) -> None:
        self.times += 1


def test_which_graphs_there_are(monkeypatch):
    """Decode steps are recorded at once, those with prompts when they come again; old ones are forgotten."""
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(graphs_module, "_MAX_GRAPHS", 3)
    captured, forwards = [], []

    def capture(self, inputs, key):
        captured.append((key[0], key[1]))
        return Replayed(), torch.zeros(8, 2)

    def forward(inputs):
        forwards.append(inputs.size)
        return torch.zeros(8, 2)

    monkeypatch.setattr(graphs_module.StepGraphs, "_capture", capture)
    merges = MergedWeights()
    state = StepState(select_kernels(CPU, torch.float32))
    graphs = graphs_module.StepGraphs(state, merges, forward, CPU)
    buffers = StepBuffers(max_sequences=8, max_pages=2, device=CPU, max_tokens=16)

    def run(size, *, prompts=False, merged=False):
        inputs = dataclasses.replace(empty_inputs(buffers, size, prompts=prompts), used=3, merged=merged)
        assert graphs.run(inputs).shape == (3, 2)

    for _ in range(3):
        run(4)
        run(4, prompts=True)
    assert (captured, forwards) == ([(4, False), (4, True)], [4])
    assert [graph.times for graph, _ in graphs._recorded.values()] == [3, 2]
    run(8)
    run(4)
    run(2)  # in the place of the one with prompts, which is longest ago
    assert [(size, prompts) for size, prompts, *_ in graphs._recorded] == [(8, False), (4, False), (2, False)]
    run(4, prompts=True)  # met before
    assert (len(graphs), forwards) == (3, [4])
    merges.install(None)
    run(8, merged=True)
    merges.install(None)
    run(8, merged=True)
    assert [key[-1] for key in graphs._recorded] == [0, 0, 2]


def test_a_base_is_compiled_once():
    base = prepare_base(tiny_model(FAMILIES["llama"]), kernels=select_kernels(CPU, torch.float32))
    compile_layers(base, backend="eager")
    forward = base.layers[0].forward
    compile_layers(base, backend="eager")
    assert base.layers[0].forward is forward


class Recording:
    """Graphs that take ten seconds each."""

    def __init__(self) -> None:
        self.now = 0.0
        self.sizes: list[int] = []

    def record(self, inputs):
        self.now += 10
        self.sizes.append(inputs.size)


@pytest.mark.parametrize(
    ("limit", "recorded"), [(100, [1, 2, 4, 8]), (45, [1, 2, 4, 8]), (25, [2, 4, 8]), (0.1, [8])]
)
def test_recording_ends_in_time_and_has_the_largest_batch(monkeypatch, limit, recorded):
    stopped, shown, graphs = [], [], Recording()
    monkeypatch.setattr(graphs_module, "compile_no_more", lambda: stopped.append(True))
    buffers = StepBuffers(max_sequences=8, max_pages=2, device=CPU)
    with capture_logs() as logs:
        got = record_sizes(
            graphs,
            buffers,
            [1, 2, 4, 8],
            [5, 6],
            lambda done, total: shown.append((done, total)),
            limit=limit,
            clock=lambda: graphs.now,
        )
    order = [8, 4, 2, 1, 6, 5]
    done = {100: 6, 45: 5, 25: 3, 0.1: 1}[limit]
    assert got == recorded
    assert graphs.sizes == order[:done]
    late = done < len(order)
    assert bool(stopped) is late
    assert [entry["log_level"] for entry in logs] == ["warning"] * late
    assert shown == [(number, 6) for number in range(done + (not late))]


def test_what_is_not_compiled_yet_runs_uncompiled_from_then_on():
    compiled = []

    def backend(module, inputs):
        compiled.append(module)
        return module.forward

    first, second = (torch.compile(lambda x, n=n: x + n, backend=backend) for n in (1, 2))
    try:
        assert first(torch.zeros(2)).tolist() == [1, 1]
        compile_no_more()
        assert first(torch.zeros(2)).tolist() == [1, 1]
        assert second(torch.zeros(2)).tolist() == [2, 2]
        assert len(compiled) == 1
    finally:
        torch.compiler.set_stance("default")
        torch.compiler.reset()


def test_progress_is_a_line_of_the_log_or_a_bar_on_a_terminal(monkeypatch):
    with capture_logs() as logs, recording_progress() as progress:
        progress(0, 2)
        progress(1, 2)
    assert [(entry["event"], entry["done"]) for entry in logs] == [
        ("recording_graphs", 0),
        ("recording_graphs", 1),
    ]
    screen = io.StringIO()
    monkeypatch.setattr(screen, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    with capture_logs() as logs, recording_progress() as progress:
        pass
    assert screen.getvalue() == ""
    with capture_logs() as logs, recording_progress() as progress:
        progress(1, 7)
    assert "1/7" in screen.getvalue()
    assert not logs
