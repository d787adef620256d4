"""Flags, YAML and defaults, and what they refuse."""

from __future__ import annotations

from pathlib import Path

import pytest
from hotswap_trainer import methods
from hotswap_trainer.config import configure
from hotswap_trainer.errors import OptionError
from hotswap_trainer.options import specs

REQUIRED = {"data": "d.jsonl", "name": "acme/task", "output": "store"}


def config(tmp_path, text):
    path = tmp_path / "train.yaml"
    path.write_text(text)
    return path


def test_flag_over_yaml_over_default(tmp_path):
    path = config(tmp_path, "r: 8\nbatch-size: 2\nlearning_rate: 1e-4\n")
    run = configure({**REQUIRED, "rank": "4", "batch_size": None}, path)
    assert run.method_options.rank == 4  # flag, over the YAML's other spelling
    assert run.options.batch_size == 2  # YAML, spelled as the flag is
    assert run.learning_rate == 1e-4  # which YAML reads as a string
    assert run.options.epochs == 3.0  # default


def test_the_learning_rate_defaults_to_the_methods():
    assert configure(REQUIRED).learning_rate == methods.available()["lora"].learning_rate


def test_yaml_takes_lists_and_mappings_and_flags_take_text(tmp_path):
    path = config(
        tmp_path,
        "target_modules: q_proj,v_proj\nlayers_to_transform: [0, 2]\nrank_pattern: {q_proj: 2}\n"
        "rslora: true\n",
    )
    by_yaml = configure(REQUIRED, path).method_options
    by_flags = configure(
        {
            **REQUIRED,
            "target_modules": "q_proj,v_proj",
            "layers_to_transform": "0,2",
            "rank_pattern": ["q_proj=2"],
            "rslora": True,
        }
    ).method_options
    assert by_yaml == by_flags
    assert by_yaml.layers_to_transform == (0, 2)
    assert by_yaml.rank_pattern == {"q_proj": 2}
    assert configure({**REQUIRED, "layers_to_transform": "1-3,7"}).method_options.layers_to_transform == (
        1,
        2,
        3,
        7,
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batch_sise: 2", "unknown key batch_sise; did you mean batch_size?"),
        ("zzz: 2", "unknown key zzz"),
        ("- 1", "must hold a mapping"),
        ("a: [", "is not valid YAML"),
        ("batch_size: two", "--batch-size: must be a whole number, got 'two'"),
        ("batch_size: 2.5", "--batch-size: must be a whole number"),
        ("rslora: 3", "--rslora: must be true or false"),
        ("rank_pattern: {q_proj: x}", "--rank-pattern: must be a whole number"),
    ],
)
def test_a_bad_yaml_file_is_refused_by_key(tmp_path, text, message):
    with pytest.raises(OptionError) as raised:
        configure(REQUIRED, config(tmp_path, text))
    assert message in str(raised.value)


def test_a_missing_yaml_file_is_refused(tmp_path):
    with pytest.raises(OptionError, match="--config: cannot read"):
        configure(REQUIRED, tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"method": "magic"}, "--method: must be one of .*lora.*; got 'magic'"),
        ({"data": None}, "--data: is required"),
        ({"name": "acme"}, "--name: an adapter is named tenant/name"),
        ({"name": "../up/task"}, "--name: "),
        ({"batch_size": "0"}, "--batch-size: must be over 0"),
        ({"learning_rate": "nan"}, "--learning-rate: must be over 0"),
        ({"eval_fraction": "1"}, "--eval-fraction: must be at least 0 and under 1"),
        ({"overlong": "wrap"}, "--overlong: must be one of truncate, drop"),
        ({"scheduler": "x"}, "--scheduler: must be one of"),
        ({"r": "0"}, "--rank: must be at least 1"),
        ({"dropout": "1"}, "--dropout: must be"),
        ({"target_modules": "(q_proj"}, "--target-modules: is not a valid regex"),
        ({"layers_to_transform": "3-1"}, "--layers-to-transform: the range '3-1' runs backwards"),
        ({"rank_pattern": ["q_proj"]}, "--rank-pattern: must be KEY=VALUE"),
    ],
)
def test_a_bad_flag_is_refused_by_name(flags, message):
    with pytest.raises(OptionError, match=message):
        configure({**REQUIRED, **flags})


def test_an_option_of_another_method_is_refused(monkeypatch):
    from dataclasses import dataclass

    from hotswap_trainer.options import option

    @dataclass(frozen=True, slots=True)
    class OtherOptions:
        bottleneck_size: int = option(64, help="Width.")

    lora = methods.available()["lora"]
    other = type("Other", (type(lora),), {"name": "other", "options": OtherOptions})()
    monkeypatch.setattr(methods, "available", lambda: {"lora": lora, "other": other})
    with pytest.raises(OptionError, match="--bottleneck-size: belongs to method other, not to lora"):
        configure({**REQUIRED, "bottleneck_size": "8"})
    assert (
        configure({**REQUIRED, "method": "other", "bottleneck_size": "8"}).method_options.bottleneck_size == 8
    )


def test_every_methods_options_are_documented_and_agree():
    """Methods may share an option's name only with the same type, as they share the flag."""
    types: dict[str, object] = {}
    for method in methods.available().values():
        assert method.summary
        for spec in specs(method.options):
            assert spec.help
            assert types.setdefault(spec.name, spec.type) == spec.type


def test_the_example_file_is_valid():
    path = Path(__file__).parents[2] / "examples" / "train-lora.yaml"
    run = configure(REQUIRED, path)
    assert run.options.overlong == "truncate"
    assert run.method_options.alpha == 32
