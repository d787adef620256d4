"""Which kernels serve a device and dtype."""

from __future__ import annotations

import structlog
import torch

from hotswap_server.errors import InvalidRequestError
from hotswap_server.kernels.cpu import NativeKernels, OneDnnKernels
from hotswap_server.kernels.interface import Kernels
from hotswap_server.kernels.native import load_library
from hotswap_server.kernels.reference import ReferenceKernels

_log = structlog.get_logger(__name__)

KERNEL_NAMES = ("auto", "native", "onednn", "triton", "reference")


def select_kernels(device: torch.device, dtype: torch.dtype, name: str = "auto") -> Kernels:
    """The fastest kernels for `device` and `dtype`, or the ones called `name`.

    Raises:
        InvalidRequestError: `name` is unknown or cannot serve this device and dtype.
    """
    if name not in KERNEL_NAMES:
        raise InvalidRequestError("kernels", f"must be one of {', '.join(KERNEL_NAMES)}, got {name!r}")
    if device.type == "cuda" and name in ("auto", "triton"):
        return _triton_kernels(required=name == "triton")
    if name == "triton":
        raise InvalidRequestError("kernels", f"triton serves a CUDA device; use 'auto' on {device}")
    plain_cpu = device.type == "cpu" and dtype == torch.float32
    if name in ("native", "onednn") and not plain_cpu:
        raise InvalidRequestError(
            "kernels", f"{name} serves float32 on a CPU; use 'auto' for {dtype} on {device}"
        )
    if name == "reference" or not plain_cpu:
        return ReferenceKernels()
    library = None if name == "onednn" else load_library()
    if library is not None:
        return NativeKernels(library)
    if name == "native":
        raise InvalidRequestError("kernels", "native needs a C compiler: install gcc, or use 'auto'")
    if torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return OneDnnKernels()
    return ReferenceKernels()


def _triton_kernels(*, required: bool) -> Kernels:
    try:
        from hotswap_server.kernels.triton import TritonKernels
    except ImportError as error:
        if required:
            raise InvalidRequestError("kernels", f"triton is not installed ({error})") from None
        _log.warning("triton_missing", reason=str(error), effect="a GPU runs much slower")
        return ReferenceKernels()
    return TritonKernels()
