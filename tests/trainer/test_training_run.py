"""A run from options to the store, in this process, on a tiny base."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from hotswap_trainer.config import configure
from hotswap_trainer.errors import OptionError, RunInProgressError, TrainingDivergedError
from hotswap_trainer.run import train
from safetensors.torch import load_file


def weights(published):
    return load_file(published.path / "adapter_model.safetensors")


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        torch.testing.assert_close(tensor, right[name], rtol=0, atol=0, msg=name)


@pytest.fixture
def published(flags):
    return train(configure(flags))


def test_the_version_has_everything(published, flags):
    assert published.version == 1
    assert published.path == flags["output"] / "acme" / "task" / "1"
    assert {path.name for path in published.path.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "hotswap.json",
        "README.md",
        "training.json",
        "loss.png",
    }
    assert (published.path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert not list(flags["work_dir"].iterdir())
    config = json.loads((published.path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == flags["base"]
    assert (config["peft_type"], config["r"], config["lora_alpha"], config["bias"]) == ("LORA", 4, 8, "none")
    card = (published.path / "README.md").read_text()
    assert card.startswith("---\nbase_model: ")
    assert "# acme/task" in card


def test_training_json(published, flags):
    training = json.loads((published.path / "training.json").read_text())
    saved = sum(tensor.numel() for tensor in weights(published).values())
    assert training["parameters"]["trainable"] == saved
    assert training["parameters"]["percent"] == pytest.approx(100 * saved / training["parameters"]["total"])
    assert training["data"] == {
        "sha256": hashlib.sha256(flags["data"].read_bytes()).hexdigest(),
        "eval_sha256": None,
        "train_examples": 36,
        "eval_examples": 4,
        "truncated_examples": 0,
        "dropped_examples": 0,
    }
    assert (training["method"], training["base"], training["seed"]) == ("lora", flags["base"], 0)
    assert training["steps"] == 6
    assert training["wall_seconds"] > 0
    assert training["peak_memory_bytes"]["host"] > 1 << 20
    history = training["loss"]["history"]
    assert [point["step"] for point in history if point["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert [point["step"] for point in history if point["kind"] == "eval"] == [0, 2, 4, 6]
    assert training["loss"]["train"] == history[-2]["loss"]
    assert training["loss"]["eval"] == history[-1]["loss"]
    assert training["options"]["batch_size"] == 4
    assert training["method_options"]["rank"] == 4
    assert {"torch", "transformers", "peft", "python"} <= training["versions"].keys()


def test_peft_loads_what_was_trained(published, tiny_base, tokenizer):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_base)
    ids = torch.tensor([tokenizer("ac: ")["input_ids"]])
    with torch.no_grad():
        before = base(ids).logits
        after = PeftModel.from_pretrained(base, published.path)(ids).logits
    assert not torch.allclose(before, after)


def test_it_learns(flags):
    published = train(configure({**flags, "max_steps": 120, "batch_size": 8}))
    losses = [p.loss for p in published.report.outcome.history if p.kind == "eval"]
    assert losses[-1] < 0.5 * losses[0]


def test_a_second_run_is_the_next_version_with_the_same_weights(published, flags):
    again = train(configure(flags))
    assert again.version == 2
    configs = [(version.path / "adapter_config.json").read_bytes() for version in (published, again)]
    assert configs[0] == configs[1]
    assert_same(weights(published), weights(again))


def test_another_seed_gives_other_weights(published, flags):
    other = weights(train(configure({**flags, "seed": 1})))
    assert any(not torch.equal(tensor, other[name]) for name, tensor in weights(published).items())


def test_accumulation_equals_a_larger_batch(flags):
    flags = {**flags, "group_by_length": False, "eval_fraction": 0.0}
    large = train(configure({**flags, "batch_size": 8}))
    small = train(configure({**flags, "batch_size": 4, "accumulation": 2}))
    for name, tensor in weights(large).items():
        torch.testing.assert_close(tensor, weights(small)[name], rtol=1e-3, atol=1e-5)


def test_gradient_checkpointing_changes_nothing(published, flags):
    checkpointed = train(configure({**flags, "gradient_checkpointing": True}))
    for name, tensor in weights(published).items():
        torch.testing.assert_close(tensor, weights(checkpointed)[name], rtol=1e-4, atol=1e-6)


def test_bfloat16_trains_float32_adapters(flags):
    published = train(configure({**flags, "dtype": "bfloat16"}))
    assert {tensor.dtype for tensor in weights(published).values()} == {torch.float32}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"target_modules": "q_proj,v_proj"}, 4),
        ({"target_modules": r".*\.(0|1)\.mlp\.down_proj"}, 2),
        ({"target_modules": "q_proj", "layers_to_transform": (1,)}, 1),
        ({"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3.0}, "rslora": True}, 14),
    ],
)
def test_lora_variants(flags, options, expected):
    published = train(configure({**flags, **options, "max_steps": 1, "eval_fraction": 0.0}))
    layers = {name.partition(".lora_")[0] for name in weights(published)}
    assert len(layers) == expected
    for key, value in options.items():
        if key.endswith("_pattern"):
            assert json.loads((published.path / "adapter_config.json").read_text())[key] == value


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": "nope"}, "nope matches no layer.*q_proj"),
        ({"target_modules": "q_proj,nope"}, "nope matches no layer.*q_proj"),
        ({"target_modules": r".*\.nope"}, "matches no layer.*q_proj"),
        ({"target_modules": "input_layernorm"}, "--target-modules: .*not supported.*q_proj"),
        ({"rank_pattern": {"nope": 2}}, "--rank-pattern: nope matches no adapted layer"),
        ({"layers_to_transform": (0,)}, "--layers-to-transform: needs --target-modules"),
        ({"layers_to_transform": (9,), "target_modules": "q_proj"}, "the base has layers 0 to 1"),
        ({"base": "/nowhere/at/all"}, "--base: there is no directory"),
    ],
)
def test_what_does_not_fit_the_base_is_refused(flags, options, message):
    with pytest.raises(OptionError, match=message):
        train(configure({**flags, **options}))
    assert not flags["output"].exists()


def test_a_run_that_diverges_publishes_nothing(flags):
    run = configure({**flags, "learning_rate": 1e30, "max_grad_norm": 0.0, "warmup": 0.0, "save_every": 1})
    with pytest.raises(TrainingDivergedError, match=r"became (nan|inf) at step .*--learning-rate"):
        train(run)
    assert not flags["output"].exists()
    assert not list(flags["work_dir"].glob("*/checkpoints/*"))


def test_the_same_run_twice_at_once_is_refused(flags, monkeypatch):
    from hotswap_trainer import loop

    def fit(*arguments, **options):
        with pytest.raises(RunInProgressError, match="another process"):
            train(configure(flags))
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "fit", fit)
    with pytest.raises(KeyboardInterrupt):
        train(configure(flags))


def test_evaluation_data_of_its_own(flags, tmp_path):
    held_out = tmp_path / "eval.jsonl"
    held_out.write_text('{"text": "abc"}\n')
    published = train(configure({**flags, "eval_data": held_out}))
    data = json.loads((published.path / "training.json").read_text())["data"]
    assert (data["train_examples"], data["eval_examples"]) == (40, 1)
    assert data["eval_sha256"] == hashlib.sha256(held_out.read_bytes()).hexdigest()


def test_a_run_publishes_to_a_url(flags, s3_url, capsys):
    from hotswap.layout import MANIFEST_FILE
    from hotswap.manifest import MAX_MANIFEST_BYTES, Manifest
    from hotswap.storage import open_storage

    flags["output"] = s3_url
    published = train(configure(flags))
    assert published.path == f"{s3_url}/acme/task/1"
    storage = open_storage(s3_url)
    assert {path.partition("/")[0] for path in storage.files("")} == {"acme"}, (
        "nothing of the trial write is left"
    )
    manifest = Manifest.parse(storage.read(f"acme/task/1/{MANIFEST_FILE}", MAX_MANIFEST_BYTES).data)
    assert manifest.files.keys() == {
        *("adapter_config.json", "adapter_model.safetensors", "README.md", "training.json", "loss.png")
    }
    assert json.loads(storage.read("acme/task/1/training.json", 1 << 20).data)["options"]["output"] == s3_url


def test_a_url_that_cannot_be_written_is_refused_before_the_training(flags, s3_server):
    with pytest.raises(OptionError, match=r"--output: s3://nobody-has-this/x cannot be written"):
        train(configure({**flags, "output": "s3://nobody-has-this/x"}))
    with pytest.raises(OptionError, match=r"--output: gs://b/x cannot be .*pip install 'hotswap\[gcs\]'"):
        train(configure({**flags, "output": "gs://b/x"}))


def test_a_store_that_fails_at_the_end_costs_no_training(flags, monkeypatch, capsys):
    from hotswap_trainer import run

    def fail(*arguments, **keywords):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(run, "publish", fail)
        with pytest.raises(OptionError, match=r"--output: .*disk full.*same command again"):
            train(configure(flags))
    published = train(configure(flags))
    assert "at step 6" in capsys.readouterr().err
    assert published.report.outcome.num_steps == 6
    flags["work_dir"] = flags["work_dir"] / "other"
    assert_same(weights(published), weights(train(configure(flags))))
