"""Steps as they are laid out for graphs, prompts among them, over the Triton kernels in the interpreter."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from hotswap_server.engine import runner as runner_module
from hotswap_server.engine.base import prepare_base
from hotswap_server.engine.buffers import GraphInputs
from hotswap_server.kernels.triton import TritonKernels
from support.adapters import write_bottleneck, write_lora, write_prefix
from support.models import FAMILIES, prepared, random_prompt, tiny_model
from support.running import Running

NAMES = (None, "acme/lora", "acme/head", "acme/bottleneck", "acme/prefix")


class Unrecorded:
    """Runs what a graph would replay."""

    def __init__(self, state: Any, merges: Any, forward: Callable[[GraphInputs], torch.Tensor], _: Any):
        self._forward = forward
        self.ran: list[tuple[int, bool]] = []

    def run(self, inputs: GraphInputs) -> torch.Tensor:
        self.ran.append((inputs.size, inputs.logit_rows is not None))
        return self._forward(inputs)[: inputs.used]


@pytest.mark.parametrize("ahead", [False, True])
def test_answers_are_those_of_the_cpu(device, tokenizer, tmp_path, monkeypatch, ahead):
    if device.type != "cpu":
        pytest.skip("on a GPU test_cuda.py does the same with graphs")
    model = tiny_model(FAMILIES["llama"])
    write_lora(model, tmp_path / "acme" / "lora" / "1", r=3, target_modules="all-linear")
    write_lora(model, tmp_path / "acme" / "head" / "1", r=2, target_modules=["q_proj", "lm_head"])
    write_bottleneck(model, tmp_path / "acme" / "bottleneck" / "1", bottleneck_size=5)
    write_prefix(model, tmp_path / "acme" / "prefix" / "1", tokens=7)
    monkeypatch.setattr(runner_module, "StepGraphs", Unrecorded)

    def answers(base):
        with Running(
            base, tokenizer, tmp_path, max_batch_size=4, max_batch_tokens=90, run_ahead=ahead
        ) as running:
            outcomes = [
                running.generate(random_prompt(length, seed=length), name, max_new_tokens=3)
                for length, name in zip((5, 30, 9, 100, 70), NAMES, strict=True)
            ]
            score = running.score(random_prompt(12, seed=1), "acme/lora")
            tokens = [outcome.result().tokens for outcome in outcomes]
            logprobs = [entry.logprob for entry in score.scored.logprobs]
            return tokens, logprobs, running.engine._runner.graphs

    expected, expected_logprobs, _ = answers(prepared(model))
    got, logprobs, graphs = answers(prepare_base(model, kernels=TritonKernels()))
    assert got == expected
    assert logprobs == pytest.approx(expected_logprobs, abs=1e-4)
    assert {prompts for _, prompts in graphs.ran} == {True, False}
    assert {size for size, prompts in graphs.ran if prompts} == {64, 90}
