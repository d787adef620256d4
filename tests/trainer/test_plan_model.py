"""A model's plan: counts against the trainer's own models, steps without memory against steps with it."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hotswap.shapes import SHAPES
from hotswap_client.cli._app import app
from hotswap_trainer.errors import OptionError
from hotswap_trainer.planning import PlanOptions, plan, rule
from hotswap_trainer.planning.hardware import required
from hotswap_trainer.planning.model_plan import MethodPlan, ModelPlan
from hotswap_trainer.planning.options import METHODS
from hotswap_trainer.planning.recommend import recommend
from hotswap_trainer.planning.serving import Serving
from hotswap_trainer.planning.step import Step, build, measure, simulate
from hotswap_trainer.planning.units import GIB
from support.models import FAMILIES
from transformers import LlamaConfig
from typer.testing import CliRunner

SMALL = PlanOptions(seq=24, batch=2, dtype="fp32", rank=4, bottleneck_size=8, num_virtual_tokens=5)


@pytest.fixture(autouse=True)
def _quiet_libraries() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "80")
        yield


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", ["full", "lora", "qlora", "bottleneck", "prefix"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_step_without_memory_is_as_large_as_one_with(method: str, dtype: str, checkpointing: bool) -> None:
    if method == "prefix" and checkpointing:
        pytest.skip("the trainer refuses it")
    options = dataclasses.replace(SMALL, dtype=dtype)
    config = FAMILIES["llama"]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*gradient_checkpointing_enable. is deprecated", FutureWarning)
        real = measure(build(config, method, options, rank=4, checkpointing=checkpointing), options)
    fake = simulate(config, method, options, rank=4, checkpointing=checkpointing)
    # A prefix has its tokens' numbers on the meta device, and copies them.
    copied = 8 * options.num_virtual_tokens if method == "prefix" else 0
    expected = dataclasses.replace(real, activations=real.activations + copied, peak=real.peak + copied)
    assert fake == expected


@pytest.mark.parametrize("family", ["qwen3", "gemma", "gemma3"])
def test_every_family_is_planned(family: str) -> None:
    steps = {
        method: simulate(FAMILIES[family], method, SMALL, rank=4, checkpointing=False)
        for method in ("full", "qlora", "prefix")
    }
    assert steps["qlora"].peak < steps["full"].peak
    assert all(step.activations > 0 for step in steps.values())


def test_trained_parameters_are_those_of_the_formulas() -> None:
    config = FAMILIES["llama"]
    shape = {"hidden": 64, "inner": 96, "kv": 32, "layers": 2}
    steps = {method: simulate(config, method, SMALL, rank=4, checkpointing=False) for method in METHODS}
    linears = [(64, 64), (64, 32), (64, 32), (64, 64), (64, 96), (64, 96), (96, 64)]
    assert steps["lora"].num_trained == 2 * sum(rule.lora_parameters(*linear, 4) for linear in linears)
    assert steps["qlora"].num_trained == steps["lora"].num_trained
    assert steps["bottleneck"].num_trained == 2 * 2 * rule.bottleneck_parameters(shape["hidden"], 8)
    assert steps["prefix"].num_trained == rule.prefix_parameters(2, 2, 16, 5)


def test_lora_of_llama_3b_is_the_erratas_count() -> None:
    options = PlanOptions(seq=8, batch=1, target_modules="q_proj,v_proj")
    step = simulate(LlamaConfig(**SHAPES["llama-3b"]), "lora", options, rank=16, checkpointing=False)
    assert step.num_trained == 4_587_520


@pytest.mark.parametrize(
    ("shape", "parameters"),
    [
        ("smollm2", 134_515_008),
        ("llama-1b", 1_235_814_400),
        ("llama-3b", 3_212_749_824),
        ("llama-8b", 8_030_261_248),
    ],
)
def test_shapes_have_their_models_parameters(shape: str, parameters: int) -> None:
    from hotswap_trainer.planning.step import fake_base

    assert sum(p.numel() for p in fake_base(LlamaConfig(**SHAPES[shape]), "bf16").parameters()) == parameters


def test_components_of_full_fine_tuning() -> None:
    config = FAMILIES["llama"]
    steps = {
        name: simulate(
            config, "full", dataclasses.replace(SMALL, optimizer=name), rank=4, checkpointing=False
        )
        for name in ("adamw", "adamw8bit", "sgd")
    }
    count = steps["sgd"].num_trained
    assert all(
        (step.weights, step.gradients) == (4 * count + _buffers(config), 4 * count) for step in steps.values()
    )
    assert steps["adamw"].optimizer == 8 * count
    assert steps["sgd"].optimizer == 0
    assert 2 * count < steps["adamw8bit"].optimizer < steps["adamw"].optimizer


def _buffers(config: Any) -> int:
    model = build(config, "full", SMALL, rank=4, checkpointing=False)
    return sum(buffer.nbytes for buffer in model.buffers())


def test_checkpointing_keeps_less() -> None:
    config = LlamaConfig(**{**SHAPES["tiny"], "num_hidden_layers": 6})
    options = PlanOptions(seq=128, batch=2)
    plain, checkpointed = (
        simulate(config, "lora", options, rank=8, checkpointing=flag) for flag in (False, True)
    )
    assert checkpointed.activations < plain.activations / 2
    assert checkpointed.weights == plain.weights


def test_the_stand_in_weighs_what_bitsandbytes_packs(tmp_path: Path) -> None:
    from hotswap_trainer import methods
    from transformers import AutoModelForCausalLM

    config = LlamaConfig(**{**SHAPES["tiny"], "hidden_size": 128, "intermediate_size": 256})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    chosen = methods.available()["qlora"]
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, **chosen.base_arguments(chosen.options(rank=4), torch.float32)
    )
    real = chosen.attach(loaded, chosen.options(rank=4))
    ours = build(config, "qlora", SMALL, rank=4, checkpointing=False)
    assert sum(p.nbytes for p in ours.parameters()) == sum(p.nbytes for p in real.parameters())
    states = [m.weight.quant_state for m in real.modules() if getattr(m, "quant_state", None) is not None]
    scales = sum(
        s.absmax.nbytes + s.code.nbytes + s.offset.nbytes + s.state2.absmax.nbytes + s.state2.code.nbytes
        for s in states
    )
    assert sum(m.constants for m in ours.modules() if hasattr(m, "constants")) == scales > 0


def test_serving() -> None:
    made = plan("tiny", PlanOptions(seq=16, context=100, methods=("lora",), rank=4))
    assert isinstance(made, ModelPlan)
    serving = made.serving
    assert serving.weights == 2 * made.num_parameters
    assert serving.weights_nf4 < serving.weights
    assert serving.kv_per_token == 2 * 2 * 2 * 16 * 2  # keys and values, layers, heads, their size, bytes
    assert serving.kv_per_request(100) == 112 * serving.kv_per_token  # whole pages of 16
    count = made.methods[0].step.num_trained
    assert serving.adapters_per_gb(count) == GIB // (2 * count)


def test_requests_beside_adapters() -> None:
    serving = Serving(weights=10 * GIB, weights_nf4=3 * GIB, kv_per_token=GIB // 1600, width=2)
    free = 24 * GIB - required(10 * GIB)
    assert serving.requests(24 * GIB, context=1600, adapters=0) == free // (1600 * (GIB // 1600))
    assert serving.requests(24 * GIB, context=1600, adapters=0, nf4=True) > 19
    assert serving.requests(8 * GIB, context=1600, adapters=0) == 0


def _planned(**peaks: tuple[float, float | None]) -> list[MethodPlan]:
    def step(method: str, peak: float) -> Step:
        trained = {"lora": 50_000_000, "prefix": 1_000_000}.get(method, 100_000_000)
        return Step(trained, 0, 0, 0, 0, 0, round(peak * GIB))

    return [
        MethodPlan(name, step(name, plain), None if less is None else step(name, less))
        for name, (plain, less) in peaks.items()
    ]


_SERVING = Serving(weights=8 * GIB, weights_nf4=3 * GIB, kv_per_token=1 << 17, width=2)
_PEAKS = {
    "full": (90.0, 70.0),
    "lora": (20.0, 12.0),
    "qlora": (10.0, 5.0),
    "bottleneck": (19.0, 12.0),
    "prefix": (18.0, None),
}


@pytest.mark.parametrize(
    ("gpu", "complexity", "tasks", "method", "checkpointing"),
    [
        (141, "complex", 1, "full", False),
        (80, "complex", 1, "full", True),
        (141, "complex", 3, "lora", False),  # a full model serves one
        (24, "moderate", 1, "lora", False),
        (16, "moderate", 1, "lora", True),
        (12, "moderate", 1, "qlora", False),
        (6.5, "moderate", 1, "qlora", True),
        (24, "simple", 1000, "prefix", False),  # 1000 of LoRA are 93 GiB
        (24, "simple", 10, "lora", False),
        (24, "moderate", 1000, "lora", False),
        (4, "moderate", 1, None, False),
        (None, "moderate", 1, "lora", False),
    ],
)
def test_recommendations(
    gpu: float | None, complexity: str, tasks: int, method: str | None, checkpointing: bool
) -> None:
    options = PlanOptions(gpu=None if gpu is None else round(gpu * GIB), complexity=complexity, tasks=tasks)
    found = recommend(_planned(**_PEAKS), _SERVING, options, 16)
    assert found.method == method
    assert ("--gradient-checkpointing" in found.flags) == checkpointing
    assert found.reason.endswith(".")
    if method is None:
        assert "qlora needs least" in found.reason
        assert "--batch" in found.reason


def test_a_full_model_alone_is_no_answer_for_several_tasks() -> None:
    found = recommend(_planned(full=(10.0, None)), _SERVING, PlanOptions(tasks=2), 16)
    assert found.method is None
    assert "adapters" in found.reason


def test_the_tables_fit_80_columns() -> None:
    result = CliRunner().invoke(app, ["plan", "--base", "tiny", "--gpu", "24GB", "--seq", "16"])
    assert result.exit_code == 0, result.output
    assert max(map(len, result.stdout.splitlines())) <= 80
    for expected in ("Training memory", "recompute", "per GB", "Serving:", "Recommendation", "hotswap train"):
        assert expected in result.stdout


def test_json_of_a_directory(tmp_path: Path) -> None:
    LlamaConfig(**SHAPES["tiny"]).save_pretrained(tmp_path)
    arguments = [
        "--base",
        str(tmp_path),
        "--seq",
        "16",
        "--json",
        "--methods",
        "lora,prefix",
        "--context",
        "64",
    ]
    result = CliRunner().invoke(app, ["plan", *arguments])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["level"] == "model"
    assert [row["method"] for row in found["training"]] == ["lora", "prefix"]
    assert found["training"][1]["checkpointing"] is None
    plain = found["training"][0]["plain"]
    parts = sum(plain[name] for name in ("weights", "constants", "gradients", "optimizer", "activations"))
    assert 0 < plain["peak"] <= parts
    assert found["recommendation"]["method"] == "lora"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--base", "nowhere"], "--base: there is no directory nowhere"),
        (["--base", "nobody/nothing"], "--base: nobody/nothing cannot be read"),
        (["--base", "tiny", "--seq", "4096"], "--seq: must be at most 2048"),
        (["--base", "tiny", "--context", "4096", "--seq", "16"], "--context: must be at most 2048"),
        (
            ["--base", "tiny", "--seq", "16", "--context", "32", "--target-modules", "nothing"],
            "--target-modules",
        ),
    ],
)
def test_mistakes_name_the_option(arguments: list[str], named: str) -> None:
    result = CliRunner().invoke(app, ["plan", *arguments])
    assert result.exit_code == 2
    assert named in result.stderr


def test_a_model_that_generates_nothing_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(OptionError, match=r"--base: .* is a vit"):
        plan(str(tmp_path))


def test_the_shape_is_the_embedded_bases() -> None:
    from hotswap.bases import BaseNotFoundError, resolve_base
    from transformers import AutoConfig

    try:
        directory = resolve_base("smollm2", progress=False)
    except BaseNotFoundError:
        pytest.skip("the package with the weights is not installed")
    config = AutoConfig.from_pretrained(directory)
    for name, value in SHAPES["smollm2"].items():
        assert getattr(config, name) == value, name
