"""What methods cost is measured on the engine that serves, which is afterwards as it was before."""

import itertools
import threading

import pytest
from hotswap_server.core import ServingPath
from hotswap_server.engine.calibration import Calibration, Calibrator, MethodCost, spread
from hotswap_server.engine.quiet_calibration import QuietCalibration
from hotswap_server.engine.step_timer import StepTimer
from hotswap_server.errors import CapacityError, DrainingError, RequestCancelledError
from support.adapters import write_bottleneck, write_lora, write_prefix
from support.models import random_prompt
from support.running import SOON_S, Running, wait_until

PROMPT = random_prompt(20, seed=0)
METHODS = {"lora", "bottleneck", "prefix", "ia3"}


@pytest.fixture(scope="module")
def store(llama, tmp_path_factory):
    store = tmp_path_factory.mktemp("store")
    for seed, name in enumerate("abc"):
        write_lora(llama, store / "acme" / name / "1", seed=seed, r=4, target_modules=["q_proj", "down_proj"])
    write_prefix(llama, store / "acme" / "prefix" / "1", tokens=20)
    write_bottleneck(llama, store / "acme" / "bottleneck" / "1")
    return store


@pytest.fixture
def running(llama_base, tokenizer, store):
    with Running(llama_base, tokenizer, store, max_batch_tokens=64) as running:
        yield running


@pytest.fixture
def calibrator(running):
    calibrator = Calibrator(running.engine, running.adapters.lender)
    yield calibrator
    calibrator.close()


def measured(calibration: Calibration) -> set[tuple[str, ServingPath]]:
    return {(cost.method, cost.path) for cost in calibration.costs}


def timed(monkeypatch, seconds) -> list[list]:
    """Have steps take `seconds(rows)`; gives the rows of each."""
    steps = []

    def time(timer, rows, *, context):
        steps.append(list(rows))
        return seconds(rows)

    monkeypatch.setattr(StepTimer, "time", time)
    return steps


def test_every_method_is_measured_with_made_up_adapters_if_need_be(running, calibrator):
    running.adapters.load("acme/a", None).result(SOON_S)
    costs = calibrator.calibrate().result(SOON_S).costs
    assert {cost.method for cost in costs} == METHODS | {"none"}
    assert {cost.batch for cost in costs} == {1, 8}
    assert {cost.method for cost in costs if cost.made_up} == METHODS - {"lora"}
    assert all(cost.ratio > 0 and cost.step_seconds > 0 for cost in costs)
    assert {cost.ratio for cost in costs if cost.method == "none"} == {1.0}
    assert {cost.adapters for cost in costs if cost.method == "lora"} == {1}


def test_it_leaves_nothing_behind(running, calibrator):
    for name in ("a", "b", "prefix", "bottleneck"):
        running.adapters.load(f"acme/{name}", None).result(SOON_S)
    expected = running.generate(PROMPT, "acme/b").result().tokens
    state = lambda: (  # noqa: E731
        running.engine.stats(),
        running.adapters.slot_stats(),
        {(r.ref, r.tier) for r in running.adapters.adapters_in_memory()},
        [(ref, r.last_used, r.used) for ref, r in running.adapters._placement.residents.items()],
        dict(running.adapters._base.prefixes),
        running.adapters.users(),
    )
    before = state()
    for _ in range(2):
        calibrator.calibrate().result(SOON_S)
    running.assert_clean()
    assert state() == before
    assert running.generate(PROMPT, "acme/b").result().tokens == expected


def test_requests_meanwhile_get_their_answers_and_are_not_starved(running, calibrator):
    expected = {
        name: running.generate(PROMPT, name).result().tokens for name in (None, "acme/a", "acme/prefix")
    }
    calibration = calibrator.calibrate()
    for _ in range(5):
        for name, tokens in expected.items():
            assert running.generate(PROMPT, name).result().tokens == tokens
    assert calibration.result(SOON_S).costs


def test_the_ratio_is_to_the_base_s_steps_around_it(running, calibrator, monkeypatch):
    ever_slower = itertools.count(1)

    def seconds(rows):
        return (0.03 if rows[0].merged else 0.05 if rows[0].adapter else 0.02) * next(ever_slower)

    running.merge("acme/a")
    steps = timed(monkeypatch, seconds)
    costs = calibrator.calibrate(made_up=False).result(SOON_S).costs
    assert measured(Calibration(costs, 0)) == {
        ("none", ServingPath.BASE),
        ("lora", ServingPath.BATCHED),
        ("lora", ServingPath.MERGED),
    }
    eight = {cost.path: cost.ratio for cost in costs if cost.batch == 8}
    assert eight == pytest.approx({ServingPath.BASE: 1, ServingPath.BATCHED: 2.5, ServingPath.MERGED: 1.5})
    assert {len(rows) for rows in steps} == {1, 8}
    running.unmerge("acme/a")
    assert ("lora", ServingPath.MERGED) not in measured(calibrator.calibrate(made_up=False).result(SOON_S))


def test_rows_use_as_many_adapters_as_there_are(running, calibrator, monkeypatch):
    for name in "abc":
        running.adapters.load(f"acme/{name}", None).result(SOON_S)
    steps = timed(monkeypatch, lambda rows: 0.01)
    calibrator.calibrate(made_up=False).result(SOON_S)
    used = [{row.adapter.name for row in rows} for rows in steps if len(rows) == 8 and rows[0].adapter]
    assert used[0] == {"acme/a", "acme/b", "acme/c"}


def test_of_many_adapters_it_takes_some_of_every_size():
    assert spread(list(range(9)), 1) == [4]
    assert spread(list(range(9)), 3) == [1, 4, 7]
    assert spread([5, 6], 8) == [5, 6]


def test_one_that_leaves_meanwhile_is_left_out(running, calibrator, monkeypatch):
    running.adapters.load("acme/a", None).result(SOON_S)

    def seconds(rows):
        monkeypatch.setattr(running.adapters.lender, "borrow", lambda ref: None)
        return 0.01

    timed(monkeypatch, seconds)
    assert measured(calibrator.calibrate(made_up=False).result(SOON_S)) == {("none", ServingPath.BASE)}


def test_a_full_cache_is_an_error_with_the_remedy(llama_base, tokenizer, store):
    with Running(llama_base, tokenizer, store, kv_pages=2) as running:
        calibrator = Calibrator(running.engine, running.adapters.lender)
        running.engine.cache.pages.allocate(2)
        with pytest.raises(CapacityError, match="no room"):
            calibrator.calibrate().result(SOON_S)
        running.engine.cache.pages.release([0, 1])
        calibrator.close()


def test_quietly_it_ends_when_a_request_comes(running, calibrator, monkeypatch):
    reached, go_on = threading.Event(), threading.Event()

    def seconds(rows):
        reached.set()
        assert go_on.wait(SOON_S)
        return 0.01

    steps = timed(monkeypatch, seconds)
    calibration = calibrator.calibrate(made_up=False, quiet=True)
    assert reached.wait(SOON_S)
    outcome = running.generate(PROMPT, max_new_tokens=30)
    go_on.set()
    with pytest.raises(RequestCancelledError, match="a request came"):
        calibration.result(SOON_S)
    assert len(steps) == 1
    assert outcome.result().tokens


def test_nobody_waiting_ends_it(running, calibrator, monkeypatch):
    reached, go_on = threading.Event(), threading.Event()

    def seconds(rows):
        reached.set()
        assert go_on.wait(SOON_S)
        return 0.01

    steps = timed(monkeypatch, seconds)
    calibration = calibrator.calibrate()
    assert reached.wait(SOON_S)
    assert calibration.cancel()
    go_on.set()
    calibrator.close()
    assert len(steps) == 1


def test_a_server_that_stops_ends_it(llama_base, tokenizer, store):
    with Running(llama_base, tokenizer, store) as running:
        calibrator = Calibrator(running.engine, running.adapters.lender)
        calibration = calibrator.calibrate()
        running.engine.stop()
        calibrator.close()
        assert isinstance(calibration.exception(SOON_S), DrainingError | None)
        with pytest.raises(DrainingError):
            calibrator.calibrate()
        with pytest.raises(DrainingError):
            running.engine.chores.submit(lambda: None).result(SOON_S)


class Scripted:
    """A calibrator that counts, of a server with one LoRA."""

    def __init__(self) -> None:
        self.runs = 0
        self.here = {("lora", ServingPath.BATCHED)}

    def present(self):
        return self.here

    def calibrate(self, *, made_up, quiet):
        assert quiet
        assert not made_up
        self.runs += 1
        raise RequestCancelledError("a request came")


def test_it_is_repeated_only_when_idle_and_due():
    scripted, idle = Scripted(), True
    quiet = QuietCalibration(scripted, lambda: idle, interval_s=0.05, idle_s=0.0, poll_s=0.001)
    quiet.start()
    wait_until(lambda: scripted.runs >= 2)  # that one failed does not end it
    idle = False
    quiet.close()
    assert not quiet._is_time()
    idle = True
    patient = QuietCalibration(scripted, lambda: idle, interval_s=1000, idle_s=0.0)
    assert patient._is_time()
    costs = (MethodCost("lora", ServingPath.BATCHED, 1, 1.1, 0.1, 1, False),)
    patient.note(Calibration(costs, 0.1))
    assert not patient._is_time()
    scripted.here = scripted.here | {("prefix", ServingPath.BATCHED)}
    assert patient._is_time()
    scripted.here = set()
    assert not patient._is_time()
