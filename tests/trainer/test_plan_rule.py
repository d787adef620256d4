"""The rule of thumb gives what the lesson's formulas give, not what its comments say."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from hotswap_client.cli._app import app
from hotswap_trainer.errors import OptionError
from hotswap_trainer.planning import PlanOptions, RulePlan, plan, rule
from hotswap_trainer.planning.hardware import GPUS, parse_gpu, required, smallest
from hotswap_trainer.planning.units import GIB, parse_memory, parse_size, show_bytes
from typer.testing import CliRunner


@pytest.mark.parametrize(
    ("billions", "gb", "commented"),
    [(1.0, 13.0, 13.1), (3.0, 39.1, 39.2), (7.0, 91.3, 91.5), (13.0, 169.5, 170.1), (70.0, 912.7, 915.5)],
)
def test_full_fine_tuning_is_what_the_formula_gives(billions: float, gb: float, commented: float) -> None:
    total = rule.full_memory(billions).total
    assert round(total, 1) == gb != commented


def test_bytes_per_parameter_are_the_lessons() -> None:
    def per_parameter(dtype: str, optimizer: str) -> float:
        return round(rule.full_memory(1.0, dtype, optimizer).total * GIB / 1e9, 6)

    assert per_parameter("bf16", "adamw") == 14
    assert per_parameter("fp32", "adamw") == 20
    assert per_parameter("bf16", "sgd") == 8  # of which the lesson names 6
    assert per_parameter("bf16", "adamw8bit") == 8
    assert per_parameter("fp32", "sgd") == 12


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "sgd"])
def test_components_add_up(dtype: str, optimizer: str) -> None:
    found = rule.full_memory(7.0, dtype, optimizer)
    parts = (found.weights, found.gradients, found.optimizer, found.activations, found.unnamed)
    assert sum(parts) == pytest.approx(found.total)


def test_adapters_take_the_bases_weights_and_two() -> None:
    assert rule.adapter_memory("lora", 8).total == 18
    assert rule.adapter_memory("qlora", 70).total == 44
    assert rule.adapter_memory("prefix", 8).total == rule.adapter_memory("lora", 8).total


def test_the_lessons_hardware_is_kept_with_its_rounding() -> None:
    assert rule.lesson_hardware(13.0) == "RTX 4090 (24 GB)"
    assert rule.lesson_hardware(91.3) == "2x A100 80GB"
    # Commented as 3 and 12, which is what it takes; the formula rounds down.
    assert rule.lesson_hardware(169.5) == "2 x A100 80GB (multi-node)"
    assert rule.lesson_hardware(912.7) == "11 x A100 80GB (multi-node)"


def test_parameter_counts_of_the_errata() -> None:
    # Llama-3.2-3B: 28 layers, q_proj 3072x3072, and by grouped queries v_proj 1024x3072.
    per_layer = rule.lora_parameters(3072, 3072, 16) + rule.lora_parameters(3072, 1024, 16)
    assert 28 * per_layer == 4_587_520 != 6_815_744
    assert rule.bottleneck_parameters(4096, 64) == 528_448 != 528_128
    assert rule.prefix_parameters(32, 32, 128, 20) == 5_242_880
    assert rule.prefix_parameters(32, 8, 128, 20) == 1_310_720  # Llama 3 8B has eight heads of keys


def test_the_lessons_recommendation() -> None:
    assert rule.recommend(8, 24, "moderate", False)["rank"] == 16
    assert rule.recommend(70, 80, "complex", False)["method"] == "QLoRA"
    # Commented as Adapter Layers; but LoRA is first in the list, so it is what comes back.
    assert rule.recommend(7, 24, "simple", True)["method"] == "LoRA"
    assert rule.recommend(70, 24, "simple", True)["method"] == "Adapter Layers"
    assert rule.recommend(70, 24, "simple", False)["method"] == "none"


def test_a_size_is_planned_by_the_rule() -> None:
    made = plan("7b", PlanOptions(gpu=24 * GIB))
    assert isinstance(made, RulePlan)
    found = made.as_json()
    assert found["level"] == "rule"
    assert [(row["method"], row["total"]) for row in found["training"]] == [
        ("full", 91.3),
        ("lora", 16.0),
        ("qlora", 6.2),
        ("bottleneck", 16.0),
        ("prefix", 16.0),
    ]
    assert found["recommendation"]["method"] == "LoRA"


def test_the_rule_needs_no_heavy_library() -> None:
    code = (
        "import sys; from hotswap_trainer.planning import plan; plan('7b')\n"
        "print(*{'torch', 'transformers', 'peft', 'numpy'} & {*sys.modules})"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == ""


def test_amounts() -> None:
    assert parse_memory("24GB", "--gpu") == parse_memory("24 GiB", "--gpu") == parse_memory("24", "--gpu")
    assert parse_memory("24576MiB", "--gpu") == 24 * GIB
    assert parse_size("7b") == 7.0
    assert parse_size("135M") == 0.135
    assert parse_size("llama-8b") is None
    assert [show_bytes(count) for count in (12_288, 1.25 * GIB, 91.25 * GIB, 1234 * GIB)] == [
        "12.0 KiB",
        "1.25 GiB",
        "91.2 GiB",
        "1,234 GiB",
    ]


def test_hardware() -> None:
    assert [gpu.mebibytes for gpu in GPUS] == sorted(gpu.mebibytes for gpu in GPUS)
    assert parse_gpu("h100") == parse_gpu("H100 80GB") == 81559 * 1024**2
    assert parse_gpu("rtx4090") == 24564 * 1024**2
    assert required(20 * GIB) > 21 * GIB
    card = smallest(20 * GIB)
    assert card is not None
    assert card.name == "L4"
    assert smallest(1000 * GIB) is None


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--base", "0b"], "--base"),
        (["--base", "7b", "--gpu", "many"], "--gpu: must be an amount of memory over 0, such as 24GB"),
        (["--base", "7b", "--gpu", "0GB"], "--gpu"),
        (["--base", "7b", "--gpu", "a100"], "--gpu: a100 may be any of A100 40GB, A100 80GB"),
        (["--base", "7b", "--seq", "1"], "--seq: must be at least 2"),
        (["--base", "7b", "--batch", "0"], "--batch: must be at least 1"),
        (["--base", "7b", "--tasks", "0"], "--tasks: must be at least 1"),
        (["--base", "7b", "--complexity", "hard"], "--complexity: must be one of simple, moderate, complex"),
        (["--base", "7b", "--dtype", "fp16"], "--dtype: must be one of bf16, fp32"),
        (["--base", "7b", "--optimizer", "lion"], "--optimizer: must be one of adamw, adamw8bit, sgd"),
        (["--base", "7b", "--methods", "lora,dora"], "--methods: must be some of"),
        (["--base", "7b", "--methods", ","], "--methods: must be some of"),
    ],
)
def test_mistakes_name_the_option_and_the_remedy(arguments: list[str], named: str) -> None:
    result = CliRunner().invoke(app, ["plan", *arguments])
    assert result.exit_code == 2
    assert named in result.stderr
    assert "Traceback" not in result.output


def test_errors_of_the_functions_name_the_field() -> None:
    with pytest.raises(OptionError, match="--optimizer"):
        rule.full_memory(7.0, "bf16", "adam")
    with pytest.raises(OptionError, match="--base"):
        rule.recommend(0.0, 24, "simple", False)


def test_the_table_fits_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    result = CliRunner().invoke(app, ["plan", "--base", "70b", "--gpu", "80GB"])
    assert result.exit_code == 0
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert "912.7" in result.stdout
    assert "QLoRA" in result.stdout


def test_json() -> None:
    result = CliRunner().invoke(app, ["plan", "--base", "13b", "--json", "--methods", "full"])
    (row,) = json.loads(result.stdout)["training"]
    assert row["total"] == 169.5
    assert row["lesson_hardware"] == "2 x A100 80GB (multi-node)"
