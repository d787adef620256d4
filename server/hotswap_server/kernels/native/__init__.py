"""The CPU kernels in C, compiled once for this machine at first use and cached.

A wheel built elsewhere could not use this processor's vector width, and a compile takes a second or two,
so the sources travel and the compiler runs here.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import structlog

_SOURCES = ("linear.c", "attention.c", "lora.c", "bottleneck.c", "merge.c")
_HEADERS = ("native.h", "lowrank.h")
_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC")

_log = structlog.get_logger(__name__)


class NativeBuildError(RuntimeError):
    """The C kernels could not be compiled; the message holds the compiler's output."""


@functools.cache
def load_library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where there is no C compiler (`CC`, `cc` or `gcc`).

    The shared object binds to the OpenMP runtime that torch has loaded, so both use one thread pool.

    Raises:
        NativeBuildError: a compiler is there and fails.
    """
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        _log.warning(
            "native_kernels_unavailable", reason="no C compiler found", remedy="install gcc, or set CC"
        )
        return None
    library = ctypes.CDLL(str(_build(compiler)))
    _declare(library)
    return library


def _build(compiler: str) -> Path:
    folder = Path(__file__).parent
    digest = hashlib.sha256()
    for name in _SOURCES + _HEADERS:
        digest.update((folder / name).read_bytes())
    for part in (compiler, *_FLAGS, platform.machine(), _processor()):
        digest.update(part.encode())
    target = _cache_dir() / f"kernels-{digest.hexdigest()[:20]}.so"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        output = Path(scratch) / target.name
        command = [compiler, *_FLAGS, "-o", str(output), *(str(folder / name) for name in _SOURCES), "-lm"]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            raise NativeBuildError(f"{' '.join(command)} failed:\n{result.stderr}")
        os.replace(output, target)
    return target


def _cache_dir() -> Path:
    override = os.environ.get("HOTSWAP_CACHE_DIR")
    if override:
        return Path(override) / "kernels"
    from platformdirs import user_cache_dir

    return Path(user_cache_dir("hotswap")) / "kernels"


def _processor() -> str:
    """What `-march=native` depends on: the processor's features, since machines may share a home."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _declare(library: ctypes.CDLL) -> None:
    """Arguments as in the C sources: p is a pointer, i an int64, f a float."""
    kinds: dict[str, Any] = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "f": ctypes.c_float}
    signatures = {
        "hotswap_linear": "pppp iiii",
        "hotswap_paged_attention": "pii ppp i pp iiiiii ff i",
        "hotswap_write_cache": "pii ppp iiii",
        "hotswap_lora": "pppppppp iiiiii",
        "hotswap_bottleneck": "ppppppppppp iiii",
        "hotswap_merge": "ppppp iii",
    }
    for name, signature in signatures.items():
        function = getattr(library, name)
        function.argtypes = [kinds[kind] for kind in signature.replace(" ", "")]
        function.restype = None
    library.hotswap_panel_width.restype = ctypes.c_int64
