"""An adapter's two files, checked: JSON and safetensors, never a pickle, only finite floats."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, NoReturn

import safetensors
import torch
from hotswap.layout import CONFIG_FILE, WEIGHTS_FILE, content_digest

from hotswap_server.core import AdapterRef
from hotswap_server.errors import AdapterInvalidError

PICKLE_FILE: Final = "adapter_model.bin"
CONVERT_REMEDY: Final = (
    "a pickle can run code, so it is never read; convert it to safetensors: load it with "
    "PeftModel.from_pretrained and save it with save_pretrained"
)

_DTYPES: Final = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class RawCheckpoint:
    """One adapter as its files spell it, before any method has looked at it.

    `config` is `adapter_config.json`; `tensors` are on the CPU, float32, float16 or bfloat16, all finite, and
    share no memory. `nbytes` counts the tensors' bytes.
    """

    ref: AdapterRef
    config: Mapping[str, object]
    tensors: Mapping[str, torch.Tensor] = field(repr=False)
    nbytes: int


class AdapterChangedError(AdapterInvalidError):
    """The files were changed in place after the adapter was looked up; a new lookup sees the new content."""


def parse_checkpoint(config_bytes: bytes, weights_bytes: bytes, ref: AdapterRef) -> RawCheckpoint:
    """The checkpoint that the two files hold.

    Raises:
        AdapterChangedError: the bytes are not those that `ref.digest` was made of.
        AdapterInvalidError: a file is damaged; the message names it, and the tensor or field if there is one.
    """
    if content_digest(config_bytes, weights_bytes) != ref.digest:
        raise AdapterChangedError(
            f"{ref}: its files changed after it was looked up; request it again, and publish new content "
            f"as a new version",
            adapter=str(ref),
        )
    config = parse_config(config_bytes, str(ref))
    tensors = parse_weights(weights_bytes, str(ref))
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    return RawCheckpoint(ref, config, tensors, nbytes)


def parse_config(data: bytes, adapter: str) -> dict[str, object]:
    """The fields of an `adapter_config.json`. `adapter` is the name that messages begin with.

    Raises:
        AdapterInvalidError: it is no JSON object in UTF-8, or repeats a field, or holds NaN or infinity.
    """
    try:
        config = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique_fields,
            parse_constant=_refuse_constant,
            parse_float=_finite_float,
        )
    except (ValueError, RecursionError) as error:
        detail = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise file_error(adapter, CONFIG_FILE, f"is not valid JSON: {detail}") from None
    if not isinstance(config, dict):
        raise file_error(adapter, CONFIG_FILE, f"must hold a JSON object, not a {type(config).__name__}")
    return config


def parse_weights(data: bytes, adapter: str) -> dict[str, torch.Tensor]:
    """The tensors of an `adapter_model.safetensors`, copied out of `data`. `adapter` begins each message.

    Raises:
        AdapterInvalidError: it is no well-formed safetensors file, or a tensor is not float32, float16 or
            bfloat16, or holds NaN or infinity.
    """
    try:
        entries = safetensors.deserialize(data)  # type: ignore[no-untyped-call]
    except safetensors.SafetensorError as error:
        raise file_error(adapter, WEIGHTS_FILE, _not_safetensors(data, error)) from None
    tensors: dict[str, torch.Tensor] = {}
    for name, entry in entries:
        dtype = _DTYPES.get(entry["dtype"])
        if dtype is None:
            raise file_error(
                adapter,
                WEIGHTS_FILE,
                f"tensor {name!r} is {entry['dtype']}; only F32, F16 and BF16 are served",
            )
        content, shape = entry["data"], entry["shape"]
        if not content:
            raise file_error(adapter, WEIGHTS_FILE, f"tensor {name!r} of shape {shape} is empty")
        tensor = torch.frombuffer(content, dtype=dtype).reshape(shape)
        # A sum is finite only if every term is, and is many times faster than looking at each of them.
        if not tensor.sum(dtype=torch.float32).isfinite() and not tensor.isfinite().all():
            kind = "NaN" if torch.isnan(tensor).any() else "infinity"
            raise file_error(adapter, WEIGHTS_FILE, f"tensor {name!r} holds {kind}; train the adapter again")
        tensors[name] = tensor
    if not tensors:
        raise file_error(adapter, WEIGHTS_FILE, "holds no tensors")
    return tensors


def file_error(adapter: str, file: str, problem: str) -> AdapterInvalidError:
    """The error that says what is wrong with one file of an adapter."""
    return AdapterInvalidError(f"{adapter}: {file} {problem}", adapter=adapter, file=file)


def _not_safetensors(data: bytes, error: Exception) -> str:
    # Looked at after the parser has refused: a valid header length can begin with the same bytes.
    if data.startswith(b"PK\x03\x04"):
        return f"is a zip or torch.save archive: {CONVERT_REMEDY}"
    if len(data) >= 2 and data[0] == 0x80 and 2 <= data[1] <= 5:
        return f"is a pickle: {CONVERT_REMEDY}"
    return f"is not a valid safetensors file, so it may be truncated or damaged ({error}); copy it again"


def _unique_fields(pairs: list[tuple[str, object]]) -> dict[str, object]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"field {repeated!r} appears twice")
    return fields


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a JSON number")


def _finite_float(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is too large")
    return number
