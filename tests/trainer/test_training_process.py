"""The trainer as a process: killed, interrupted, started by torchrun, and given bad input."""

from __future__ import annotations

import signal

import pytest
import torch
import typer
from hotswap_trainer.cli import train
from hotswap_trainer.workdir import WorkDir, mark_complete
from safetensors.torch import load_file
from support.training import as_arguments, finish, wait_for_checkpoint
from typer.testing import CliRunner


def weights(store):
    return load_file(store / "acme" / "task" / "1" / "adapter_model.safetensors")


@pytest.fixture
def long_flags(flags):
    """Long enough to be killed in the middle, of an epoch too; dropout needs the random state restored."""
    return {**flags, "max_steps": 60, "save_every": 4, "dropout": 0.2, "device": "cpu"}


@pytest.fixture
def train_here(monkeypatch, tmp_path):
    """Call the command in this process."""
    monkeypatch.setenv("HOTSWAP_CACHE_DIR", str(tmp_path / "cache"))
    app = typer.Typer()
    app.command()(train)
    return lambda options: CliRunner().invoke(app, as_arguments(options))


def assert_one_line(exit_code: int, output: str, message: str) -> None:
    assert exit_code == 2
    (line,) = output.strip().splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_a_killed_run_goes_on_and_ends_as_if_never_killed(train_process, long_flags, tmp_path):
    whole = {**long_flags, "output": tmp_path / "whole", "work_dir": tmp_path / "whole-work"}
    undisturbed = train_process(whole)
    process = train_process(long_flags)
    wait_for_checkpoint(process, long_flags["work_dir"], 20)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not long_flags["output"].exists()

    output = finish(train_process(long_flags))
    assert "Resuming the interrupted run at step" in output
    assert "acme/task@1" in output
    finish(undisturbed)
    resumed, expected = weights(long_flags["output"]), weights(whole["output"])
    for name, tensor in expected.items():
        torch.testing.assert_close(resumed[name], tensor, rtol=1e-5, atol=1e-7)
    configs = [store / "acme/task/1/adapter_config.json" for store in (long_flags["output"], whole["output"])]
    assert configs[0].read_bytes() == configs[1].read_bytes()
    assert [path.name for path in (long_flags["output"] / "acme" / "task").iterdir()] == ["1"]


def test_an_interrupted_run_says_how_to_go_on(train_process, long_flags):
    process = train_process({**long_flags, "max_steps": 5000})
    wait_for_checkpoint(process, long_flags["work_dir"], 4)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "The same command goes on from the last checkpoint" in output
    assert "Traceback" not in output
    assert not long_flags["output"].exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "magic"}, "--method: must be one of bottleneck, full"),
        ({"data": "missing.jsonl"}, "cannot read the data file missing.jsonl: No such file"),
        ({"output": "/proc/store"}, "--output: /proc/store cannot be written"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(train_here, flags, options, message):
    result = train_here({**flags, **options})
    assert_one_line(result.exit_code, result.output, message)


def test_a_process_given_bad_input_says_one_line_too(train_process, flags):
    process = train_process({**flags, "target-modules": "nope"})
    output, _ = process.communicate(timeout=60)
    assert_one_line(process.returncode, output, "nope matches no layer")


def test_a_half_written_checkpoint_is_not_resumed(tmp_path):
    work = WorkDir(tmp_path, {"a": 1})
    work.open()
    assert work.last_checkpoint() is None
    for step in (4, 8, 12):
        directory = work.checkpoints / f"checkpoint-{step}"
        directory.mkdir()
        (directory / "weights").write_text("…")
        if step < 12:
            mark_complete(directory, seconds=step / 2)
    last = work.last_checkpoint()
    assert last is not None
    assert (last.step, last.seconds) == (8, 4.0)
    work.discard_incomplete()
    assert sorted(path.name for path in work.checkpoints.iterdir()) == ["checkpoint-4", "checkpoint-8"]
    work.remove()
    assert not work.path.exists()


def test_other_options_are_another_run(tmp_path):
    assert WorkDir(tmp_path, {"a": 1}).path != WorkDir(tmp_path, {"a": 2}).path
