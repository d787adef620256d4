"""AdapterHub's checkpoints: the same logits after the import, and refusals by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import hotswap_trainer.methods.bottleneck.tuner  # noqa: F401  (PEFT then knows the method)
import pytest
import torch
from hotswap.names import AdapterName
from hotswap_trainer.adapterhub import convert, import_adapter
from hotswap_trainer.errors import CheckpointError
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

FIXTURES = Path(__file__).parent / "fixtures" / "adapterhub"
NAME = AdapterName("acme", "task")


@pytest.fixture
def checkpoint(tmp_path):
    """A copy of a checkpoint, with options of its configuration changed."""

    def make(kind="parallel", top=None, **options):
        directory = tmp_path / kind
        shutil.copytree(FIXTURES / kind, directory)
        path = directory / "adapter_config.json"
        whole = json.loads(path.read_text())
        whole.update(top or {})
        whole["config"].update(options)
        path.write_text(json.dumps(whole))
        return directory

    return make


def edit_tensors(directory, change):
    path = directory / "adapter.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("kind", "layout", "layers"),
    [("houlsby", "houlsby", None), ("pfeiffer", "pfeiffer", [0, 2]), ("parallel", "parallel", None)],
)
def test_an_imported_adapter_gives_adapterhubs_logits(kind, layout, layers, tmp_path):
    expected = load_file(FIXTURES / "expected.safetensors")
    version = import_adapter(FIXTURES / kind, NAME, tmp_path, base=FIXTURES / "base", label="acme-base")
    directory = tmp_path / "acme" / "task" / str(version)
    config = json.loads((directory / "adapter_config.json").read_text())
    assert (config["peft_type"], config["layout"], config["layers"]) == ("BOTTLENECK", layout, layers)
    assert config["base_model_name_or_path"] == "acme-base"
    base = AutoModelForCausalLM.from_pretrained(FIXTURES / "base")
    model = PeftModel.from_pretrained(base, directory)
    with torch.no_grad():
        logits = model(expected["ids"]).logits
        with model.disable_adapter():
            plain = model(expected["ids"]).logits
    torch.testing.assert_close(logits, expected[kind], rtol=0, atol=1e-5)
    assert (logits - plain).abs().max() > 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ln_before": True}, "ln_before = True is a layer norm before the bottleneck"),
        ({"ln_after": True}, "ln_after = True is a layer norm after"),
        ({"use_gating": True}, "use_gating = True is a gate"),
        ({"phm_layer": True}, "phm_layer = True is hypercomplex"),
        ({"cross_adapter": True}, "cross_adapter = True is an adapter after cross-attention"),
        ({"inv_adapter": "nice"}, "inv_adapter = 'nice' is an invertible adapter"),
        ({"original_ln_after": False}, "original_ln_after = False is leaving out the model's own residual"),
        ({"architecture": "prefix_tuning"}, "architecture = 'prefix_tuning' is another kind"),
        ({"scaling": "learned"}, "scaling 'learned' is learned"),
        ({"reduction_factor": {"1": 8, "default": 16}}, "reduction_factor that differs by layer"),
        ({"non_linearity": "mish"}, "non_linearity: must be one of"),
        (
            {"residual_before_ln": "post_add"},
            "residual_before_ln = 'post_add' adds the residual stream twice",
        ),
        ({"is_parallel": False, "original_ln_before": True, "residual_before_ln": False}, "stream twice"),
        ({"brand_new": 1}, "option brand_new = 1 is unknown"),
        ({"leave_out": [1]}, "the tensors are of layers .* without leave_out"),
        ({"mh_adapter": False}, "attention: is not of a place that is adapted"),
        ({"top": {"model_type": "qwen2"}}, "model_type 'qwen2' is not supported, only llama, mistral"),
        ({"top": {"hidden_size": 8}}, "hidden_size 8 is not the base's, 16"),
        ({"top": {"peft_type": "LORA"}}, "is PEFT's; copy the directory into the store"),
        ({"top": {"config": "pfeiffer"}}, "is not AdapterHub's"),
        ({"top": {"name": "other"}}, "is no part of a bottleneck of the adapter 'other'"),
    ],
)
def test_what_differs_in_meaning_is_refused_by_name(checkpoint, options, message):
    top = options.pop("top", {})
    config = top.pop("config", None)
    directory = checkpoint(top=top, **options)
    if config is not None:
        path = directory / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "config": config}))
    with pytest.raises(CheckpointError, match=message):
        convert(directory, base=FIXTURES / "base")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update(gate=torch.ones(1)), "tensor gate: is no part of a bottleneck"),
        (lambda t: t.pop(next(iter(t))), "is missing"),
        (lambda t: next(iter(t.values())).fill_(float("nan")), "holds NaN or infinity"),
        (lambda t: t.clear(), "holds no tensors"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(checkpoint, change, message):
    directory = checkpoint()
    edit_tensors(directory, change)
    with pytest.raises(CheckpointError, match=message):
        convert(directory)


def test_a_fusion_is_refused(checkpoint):
    directory = checkpoint()
    (directory / "adapter_fusion_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="a fusion of adapters is not supported"):
        convert(directory)


def test_an_output_layer_must_be_the_bases_own(checkpoint):
    directory = checkpoint("houlsby")
    with pytest.raises(CheckpointError, match="give --base to compare it"):
        convert(directory)
    convert(directory, base=FIXTURES / "base")
    head = torch.load(directory / "pytorch_model_head.bin", weights_only=True)
    torch.save({"lm_head.weight": head["lm_head.weight"] + 1}, directory / "pytorch_model_head.bin")
    with pytest.raises(CheckpointError, match="not the base's own, so it was trained"):
        convert(directory, base=FIXTURES / "base")
    torch.save({"heads.classify.1.weight": torch.ones(2, 16)}, directory / "pytorch_model_head.bin")
    with pytest.raises(CheckpointError, match="holds a prediction head"):
        convert(directory, base=FIXTURES / "base")


class Bomb:
    def __reduce__(self):
        return (Path.write_text, (Path("exploded"), "boom"))


def test_a_pickle_runs_no_code(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    directory = checkpoint("pfeiffer")
    torch.save({"weight": Bomb()}, directory / "pytorch_adapter.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_adapter\.bin: is broken, or holds more than tensors"):
        convert(directory)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("content", [b"", b"not a pickle"])
def test_a_broken_file_is_refused(checkpoint, content):
    directory = checkpoint("pfeiffer")
    (directory / "pytorch_adapter.bin").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"pytorch_adapter\.bin: "):
        convert(directory)


def test_the_verb(checkpoint, tmp_path):
    import typer
    from hotswap_trainer.import_verb import import_adapter as verb
    from typer.testing import CliRunner

    app = typer.Typer()
    app.command()(verb)
    store = tmp_path / "store"
    arguments = ["--name", "acme/task", "--store", str(store)]
    result = CliRunner().invoke(app, [str(checkpoint()), *arguments])
    assert result.exit_code == 0, result.output
    assert "acme/task@1 is in" in result.output
    assert (store / "acme" / "task" / "1" / "adapter_model.safetensors").exists()
    refused = CliRunner().invoke(app, [str(tmp_path / "none"), *arguments])
    assert refused.exit_code == 2
    assert "cannot be read" in refused.output
    assert [path.name for path in (store / "acme" / "task").iterdir()] == ["1"]
