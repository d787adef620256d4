"""`hotswap bench --costs` and `hotswap plan --fleet`: the fit, the measurement, the commands' words."""

import json

import numpy as np
import pytest
import typer
from hotswap_server.bench.costs import Plan, measure_costs
from hotswap_server.bench.fitting import Observation, Work, fit
from hotswap_server.bench.served import ServerProcessError, served
from hotswap_server.fleet import Costs, StepCosts
from hotswap_server.fleet.verb import plan_fleet
from typer.testing import CliRunner

KNOTS = (1, 8, 32, 128)
TRUE = StepCosts(
    tokens=KNOTS,
    seconds=(0.010, 0.012, 0.013, 0.030),
    per_row=2e-4,
    per_adapter=1e-4,
    per_context_token=1e-6,
    per_prompt_pair=2e-8,
)
COSTS = Costs(TRUE, 0.002, 0.05, 0.005, 1000)


def observations(noise: float, call: float = 0.003) -> list[Observation]:
    source = np.random.default_rng(0)
    steps = [
        (Work(rows, rows, adapters, rows * context),)
        for rows in (1, 2, 4, 8, 16)
        for context in (16, 256)
        for adapters in sorted({1, rows})
    ]
    prompts = [(Work(p, 1, 1, 0, p * p / 2),) for p in (1, 8, 16, 32, 64, 128)]
    prompts.append((Work(128, 0, 1, 0, 128 * 64), Work(72, 1, 1, 0, 72 * (128 + 36))))
    found = []
    for calls, cases in ((0, steps), (1, prompts)):
        for case in cases:
            exact = call * calls + sum(
                TRUE.time(w.tokens, w.rows, w.adapters, w.context, w.pairs) for w in case
            )
            found.append(Observation(case, tuple(exact * source.normal(1, noise, 40)), calls))
    return found


def test_the_fit_finds_the_costs_that_made_the_times():
    found = fit(observations(0.0), KNOTS)
    assert found.call_seconds == pytest.approx(0.003)
    np.testing.assert_allclose(found.step.seconds, TRUE.seconds, rtol=1e-6)
    for name in ("per_row", "per_adapter", "per_context_token", "per_prompt_pair"):
        assert getattr(found.step, name) == pytest.approx(getattr(TRUE, name), rel=1e-6)
    assert max(map(abs, found.errors)) < 1e-9
    assert set(found.step.noise) == {1.0}


def test_the_fit_keeps_the_noise_of_what_was_measured():
    found = fit(observations(0.1), KNOTS)
    noise = np.array(found.step.noise)
    assert np.median(noise) == pytest.approx(1.0, abs=0.02)
    assert noise.std() == pytest.approx(0.1, rel=0.15)
    assert max(map(abs, found.errors)) < 0.1


def test_no_cost_is_below_zero():
    falling = [
        Observation((Work(rows, rows, 1, rows * context),), (0.01 / rows,))
        for rows in (1, 4)
        for context in (1, 99)
    ]
    found = fit(falling, (1, 8))
    assert min(found.step.seconds) > 0
    assert found.step.per_row == found.step.per_context_token == 0


@pytest.fixture
def plan():
    app = typer.Typer()
    app.command()(plan_fleet)
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def costs(tmp_path):
    COSTS.write(tmp_path / "costs.json")
    return tmp_path / "costs.json"


SHORT = ("--seconds", 20, "--warmup", 2, "--output-tokens", 16)


def test_the_verb_prints_a_table_and_writes_json(plan, costs, tmp_path):
    result = plan("--costs", costs, "--rate", 3, "--replicas", 2, *SHORT, "--json", tmp_path / "out.json")
    assert result.exit_code == 0, result.output
    assert "3 requests/s over 100 adapters" in result.output
    figures = json.loads((tmp_path / "out.json").read_text())
    assert figures["reports"][0]["replicas"] == 2
    assert figures["replicas_needed"] is None
    again = plan("--costs", costs, "--rate", 3, "--replicas", 2, *SHORT, "--json", "-")
    assert json.loads(again.output) == figures


def test_the_verb_finds_replicas_or_says_that_none_will_do(plan, costs):
    target = ("--rate", 30, *SHORT, "--affinity", "round-robin")
    found = plan("--costs", costs, *target, "--ttft-p95", 0.4, "--itl-p95", 0.05)
    assert found.exit_code == 0, found.output
    assert "replicas meet TTFT p95 of 400 ms and ITL p95 of 50 ms." in " ".join(found.output.split())
    none = plan("--costs", costs, *target, "--ttft-p95", 0.001, "--max-replicas", 2)
    assert none.exit_code == 1
    assert "No number up to 2 replicas meets TTFT p95 of 1 ms." in none.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--rate", 1), "costs: is required; measure them with `hotswap bench --costs FILE`"),
        (("--costs", "COSTS"), "rate: is required"),
        (("--costs", "nowhere.json", "--rate", 1), "costs: nowhere.json cannot be read"),
        (("--costs", "COSTS", "--rate", -1), "rate: must be over 0, got -1"),
        (
            ("--costs", "COSTS", "--rate", 1, "--affinity", "luck"),
            "affinity: must be one of ring, round-robin",
        ),
        (
            ("--costs", "COSTS", "--rate", 1, "--host-cache-bytes", "lots"),
            "host_cache_bytes: must be a number",
        ),
        (("--costs", "COSTS", "--rate", 1, "--host-cache-bytes", "1B"), "host_cache_bytes: must hold one"),
        (("--costs", "COSTS", "--rate", 1, "--ttft-p95", 0), "ttft_p95: must be a finite number over 0"),
    ],
)
def test_the_verb_refuses_in_one_line(plan, costs, arguments, said):
    result = plan(*(costs if argument == "COSTS" else argument for argument in arguments))
    assert result.exit_code == 2
    [line] = result.stderr.splitlines()
    assert line.startswith("hotswap plan --fleet: ")
    assert said in line


def test_a_server_that_does_not_start_says_why(tiny_base, tmp_path):
    with (
        pytest.raises(ServerProcessError, match=r"ended with exit code 2; its last line: .*adapter_slots"),
        served(tiny_base, tmp_path, "--adapter-slots", "0"),
    ):
        pass


@pytest.mark.slow
def test_a_server_of_a_tiny_base_is_measured(tiny_base, tmp_path):
    told = []
    plan = Plan(max_batch=4, rank=4, rounds=1)
    costs = measure_costs(tiny_base, plan, options=("--threads", "1"), tell=told.append)
    assert told[-1] == "measuring, round 1 of 1"
    assert costs.step.tokens == (1, 8, 32, 128, 512)
    assert 0 < costs.step.seconds[0] < 0.5
    assert costs.prefill_tokens_per_second > 0
    assert costs.load_seconds > 0
    # Rank 4 on all linear layers of two blocks, in float32.
    widths = 2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 64)
    assert costs.adapter_bytes == pytest.approx(2 * 4 * 4 * widths, rel=0.1)
    costs.write(tmp_path / "costs.json")
    assert Costs.read(tmp_path / "costs.json") == costs
