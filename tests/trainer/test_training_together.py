"""Runs of two processes, which train what one does at the same global batch; and what they refuse."""

from __future__ import annotations

import json
import signal

import pytest
import torch
from hotswap_trainer.config import configure
from hotswap_trainer.errors import OptionError
from hotswap_trainer.run import train
from safetensors.torch import load_file
from support.training import finish, wait_for_checkpoint

TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2")
# Without --multi_gpu it starts one process, or asks for MPI; our own option keeps to the CPU.
ACCELERATE = (
    *("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
    *("--mixed_precision", "no", "--dynamo_backend", "no"),
)
SHARDING = {"module": "support.sharding_on_cpu", "launcher": (*TORCHRUN, "-m")}
LAUNCHERS = {
    "torchrun": {"launcher": (*TORCHRUN, "-m")},
    "accelerate": {"launcher": (*ACCELERATE, "-m")},
    "fsdp": SHARDING,
}


def read(store):
    """The one version's weights, and its `training.json`."""
    [version] = (store / "acme" / "task").iterdir()
    assert version.name == "1"
    files = [*version.glob("adapter_model.safetensors"), *version.glob("model.safetensors")]
    return load_file(files[0]), json.loads((version / "training.json").read_text())


@pytest.fixture
def cpu_flags(flags):
    return {**flags, "device": "cpu", "eval_fraction": 0.2, "save_every": 2}  # 32 examples: whole batches


def for_method(flags, method):
    if method == "lora":
        return flags
    return {key: value for key, value in flags.items() if key != "rank"} | {
        "method": method,
        "learning_rate": 1e-3,
    }


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("how", LAUNCHERS)
def test_two_processes_train_what_one_does(train_process, cpu_flags, tmp_path, method, how):
    flags = for_method(cpu_flags, method)
    train(configure({**flags, "batch_size": 8, "output": tmp_path / "one"}))
    fsdp = {"fsdp": True} if how == "fsdp" else {}
    output = finish(train_process({**flags, **fsdp}, **LAUNCHERS[how]))
    assert output.count("acme/task@1") == 1
    (one, alone), (two, together) = read(tmp_path / "one"), read(flags["output"])
    assert together["processes"] == 2
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-4, msg=name)
    for before, after in zip(alone["loss"]["history"], together["loss"]["history"], strict=True):
        assert (before["step"], before["kind"]) == (after["step"], after["kind"])
        assert after["loss"] == pytest.approx(before["loss"], rel=1e-3)


@pytest.mark.slow
def test_the_second_process_prints_nothing(train_process, cpu_flags):
    shown = (*TORCHRUN, "--local-ranks-filter", "1", "-m")
    assert finish(train_process(cpu_flags, launcher=shown)) == ""
    assert read(cpu_flags["output"])


@pytest.mark.slow
def test_a_mistake_is_told_once(train_process, cpu_flags):
    process = train_process(
        {**cpu_flags, "target-modules": "nope"}, launcher=LAUNCHERS["torchrun"]["launcher"]
    )
    output, _ = process.communicate(timeout=120)
    assert process.returncode
    assert output.count("nope matches no layer") == 1
    assert not cpu_flags["output"].exists()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["torchrun", "fsdp"])
def test_a_killed_run_of_two_goes_on(train_process, cpu_flags, tmp_path, how):
    flags = {**cpu_flags, "max_steps": 60, "save_every": 4}
    if how == "fsdp":
        flags["fsdp"] = True
    whole = {**flags, "output": tmp_path / "whole", "work_dir": tmp_path / "whole-work"}
    finish(train_process(whole, **LAUNCHERS[how]))
    process = train_process(flags, **LAUNCHERS[how])
    wait_for_checkpoint(process, flags["work_dir"], 20)
    process.send_signal(signal.SIGTERM)  # torchrun ends its processes, which have no say
    process.communicate()
    assert not flags["output"].exists()
    assert "Resuming the interrupted run at step" in finish(train_process(flags, **LAUNCHERS[how]))
    for name, tensor in read(whole["output"])[0].items():
        torch.testing.assert_close(read(flags["output"])[0][name], tensor, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "cpu"}, r"^--fsdp: needs GPUs, .*; leave it out"),
        ({"method": "prefix", "rank": None}, r"^--fsdp: shards the methods full and lora, not prefix"),
    ],
)
def test_what_cannot_be_sharded_is_refused(flags, options, message):
    with pytest.raises(OptionError, match=message):
        train(configure({**flags, "fsdp": True, **options}))
    assert not flags["output"].exists()


def test_one_process_has_nothing_to_shard(flags, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(OptionError, match=r"^--fsdp: one process .*torchrun --nproc-per-node"):
        train(configure({**flags, "fsdp": True}))


@pytest.mark.parametrize(
    ("variable", "remedy"), [("ACCELERATE_USE_FSDP", "by --fsdp"), ("ACCELERATE_USE_DEEPSPEED", "use --fsdp")]
)
def test_what_accelerate_is_configured_to_do_beside_is_refused(flags, monkeypatch, variable, remedy):
    monkeypatch.setenv(variable, "true")
    with pytest.raises(OptionError, match=rf"^accelerate launch: .*{remedy}.* \({variable} is set\)"):
        train(configure(flags))
