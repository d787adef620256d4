"""Settings: flag before environment before YAML before default, and errors that name what to correct."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hotswap_server.config import ENV_PREFIX, ServeSettings, SettingsError, load_settings


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    import os

    for name in [name for name in os.environ if name.upper().startswith(ENV_PREFIX)]:
        monkeypatch.delenv(name)


@pytest.fixture
def yaml_file(tmp_path):
    def write(text: str):
        path = tmp_path / "serve.yaml"
        path.write_text(text)
        return path

    return write


def test_a_flag_beats_the_environment_beats_the_file_beats_the_default(yaml_file, monkeypatch):
    config = yaml_file("store: from-file\nport: 1\nhost: file\nmax_queue: 7\n")
    monkeypatch.setenv("HOTSWAP_SERVE_PORT", "2")
    monkeypatch.setenv("HOTSWAP_SERVE_HOST", "environment")
    settings = load_settings(config, port="3", host=None)
    assert (settings.port, settings.host, settings.max_queue) == (3, "environment", 7)
    assert (settings.store, settings.max_batch_size) == ("from-file", 64)


def test_the_example_shows_every_setting_with_its_default():
    example = Path(__file__).parents[2] / "examples" / "serve.yaml"
    assert load_settings(example) == load_settings(store="./store")
    assert set(yaml.safe_load(example.read_text())) == set(ServeSettings.model_fields)


def test_every_field_is_documented():
    assert [name for name, field in ServeSettings.model_fields.items() if not field.description] == []


@pytest.mark.parametrize(
    ("text", "expected"), [("512MiB", 512 << 20), ("1 GiB", 1 << 30), ("2GB", 2 * 10**9), ("4096", 4096)]
)
def test_sizes_may_have_units(text, expected, yaml_file):
    assert load_settings(store="s", kv_cache_bytes=text).kv_cache_bytes == expected
    assert load_settings(yaml_file(f"store: s\nkv_cache_bytes: {text}")).kv_cache_bytes == expected


def test_weights_are_a_map_or_pairs(yaml_file, monkeypatch):
    weights = {"acme": 2.0, "globex": 0.5}
    assert load_settings(store="s", tenant_weights="acme=2, globex=0.5").tenant_weights == weights
    assert (
        load_settings(yaml_file("store: s\ntenant_weights: {acme: 2, globex: 0.5}")).tenant_weights == weights
    )
    monkeypatch.setenv("HOTSWAP_SERVE_TENANT_WEIGHTS", "acme=2,globex=0.5")
    assert load_settings(store="s").tenant_weights == weights


def test_an_empty_variable_or_null_key_is_not_given(yaml_file, monkeypatch):
    monkeypatch.setenv("HOTSWAP_SERVE_PORT", "")
    assert load_settings(yaml_file("store: s\nport: null\n")).port == 50051


def test_an_empty_file_sets_nothing(yaml_file):
    assert load_settings(yaml_file("# nothing\n"), store="s") == load_settings(store="s")


def test_settings_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        load_settings(store="s").port = 3


@pytest.mark.parametrize(
    ("yaml", "environment", "flags", "parts"),
    [
        ("", {}, {}, ["store", "--store", "HOTSWAP_SERVE_STORE"]),
        ("", {}, {"store": "s", "port": "70000"}, ["port", "'70000'", "--port"]),
        ("", {"HOTSWAP_SERVE_PORT": "tcp://x"}, {"store": "s"}, ["'tcp://x'", "HOTSWAP_SERVE_PORT"]),
        ("port: abc", {}, {"store": "s"}, ["port", "'abc'", "serve.yaml"]),
        ("port: [1, 2]", {}, {"store": "s"}, ["port", "serve.yaml"]),
        ("prot: 1", {}, {"store": "s"}, ["'prot'", "'port'"]),
        ("model_config: 1", {}, {"store": "s"}, ["'model_config'"]),
        ("1: 2", {}, {"store": "s"}, ["1"]),
        ("- port", {}, {"store": "s"}, ["must map"]),
        ("port: [", {}, {"store": "s"}, ["not YAML"]),
        ("", {}, {"store": "s", "device": "tpu"}, ["device", "'tpu'", "'cuda'"]),
        (
            "",
            {},
            {"store": "s", "tensor_parallel": "2"},
            ["one device", "--quantize nf4", "--tensor-parallel"],
        ),
        ("", {}, {"store": "s", "max_batch_size": "0"}, ["max_batch_size", "'0'"]),
        ("", {}, {"store": "s", "kv_cache_bytes": "3 cows"}, ["kv_cache_bytes", "cows"]),
        ("", {}, {"store": "s", "drain_timeout": "inf"}, ["drain_timeout", "finite"]),
        ("", {}, {"store": "s", "drain_timeout": "nan"}, ["drain_timeout", "'nan'"]),
        ("", {}, {"store": "s", "tenant_weights": "acme"}, ["tenant_weights", "acme=2", "--tenant-weights"]),
        ("", {}, {"store": "s", "tenant_weights": "acme=0"}, ["tenant_weights", "'0'", "greater than 0"]),
        ("", {}, {"store": "s", "max_timeout": "-1"}, ["max_timeout", "'-1'"]),
    ],
)
def test_an_error_is_one_line_that_names_field_value_and_source(
    yaml, environment, flags, parts, yaml_file, monkeypatch
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError) as caught:
        load_settings(yaml_file(yaml), **flags)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(SettingsError, match=r"none\.yaml: cannot be read: No such file"):
        load_settings(tmp_path / "none.yaml")
