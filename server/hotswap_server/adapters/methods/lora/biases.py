"""Biases that an adapter brings: in place of the base's (`bias`), and of its own (`lora_bias`)."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from hotswap_server.adapters.fields import MODULE_PREFIX
from hotswap_server.adapters.methods.lora.tensors import ADAPTED_BIAS, BIAS, LORA_BIAS, LoraTensors
from hotswap_server.engine.base import BaseModel
from hotswap_server.errors import AdapterInvalidError

_KINDS = ("none", "all", "lora_only")


def bias_shifts(
    config: Mapping[str, object], tensors: LoraTensors, scalings: Mapping[str, float], base: BaseModel
) -> dict[str, torch.Tensor]:
    """What the adapter's biases add to each module's output [out_features], by module, in float32.

    Raises:
        AdapterInvalidError: a bias is missing, is none of this base or does not fit.
    """
    shifts = {
        module: bias.float() - base.biases[module].float().cpu()
        for module, bias in _replaced(config, tensors, base).items()
    }
    for module, bias in _own(config, tensors, base).items():
        own = bias.float() * scalings[module]
        shifts[module] = shifts[module] + own if module in shifts else own
    return shifts


def _replaced(config: Mapping[str, object], tensors: LoraTensors, base: BaseModel) -> dict[str, torch.Tensor]:
    kind = config.get("bias", "none")
    if kind not in _KINDS:
        raise AdapterInvalidError(
            f"adapter_config.json: bias must be one of {', '.join(_KINDS)}, got {kind!r}"
        )
    meant = {"none": set(), "all": set(base.biases), "lora_only": tensors.adapted & set(base.biases)}[kind]
    expected = {f"{module}{ADAPTED_BIAS if module in tensors.adapted else BIAS}": module for module in meant}
    for name in sorted(set(tensors.biases) - set(expected)):
        module = name.removesuffix(ADAPTED_BIAS)
        own = base.biases.get(module)
        # Of an adapted output embedding PEFT saves the base's bias, as it saves its weight.
        if own is None or not torch.equal(tensors.biases[name].to(base.dtype), own.cpu()):
            raise AdapterInvalidError(
                f"tensor {MODULE_PREFIX}{name}: is no bias that adapter_config.json (bias {kind!r}) and the "
                "base have, so nothing would use it"
            )
    replaceable = {name for group in base.groups for name in group.names} | {s.name for s in base.biased}
    result = {}
    for name, module in expected.items():
        bias = tensors.biases.get(name)
        if bias is None:
            raise AdapterInvalidError(
                f"tensor {MODULE_PREFIX}{name}: is missing, though adapter_config.json has bias {kind!r}; "
                "save the adapter again with a current PEFT, older ones left such biases out"
            )
        _check_shape(name, bias, base.biases[module].shape)
        if module not in replaceable:
            raise AdapterInvalidError(
                f"tensor {MODULE_PREFIX}{name}: this base's layer of that name has a bias that cannot be "
                "replaced for each request; train with bias 'lora_only' or 'none'"
            )
        result[module] = bias
    return result


def _own(config: Mapping[str, object], tensors: LoraTensors, base: BaseModel) -> Mapping[str, torch.Tensor]:
    given = tensors.lora_biases
    wanted = set(tensors.pairs) if config.get("lora_bias") else set()
    if wanted and config.get("use_dora"):
        raise AdapterInvalidError("adapter_config.json: lora_bias and use_dora exclude each other")
    if unused := sorted(set(given) - wanted):
        raise AdapterInvalidError(
            f"tensor {unused[0]}{LORA_BIAS}: adapter_config.json (lora_bias, target_modules) has no place "
            "for it"
        )
    if missing := sorted(wanted - set(given)):
        raise AdapterInvalidError(
            f"tensor {missing[0]}{LORA_BIAS}: is missing, though adapter_config.json has lora_bias"
        )
    for module, bias in given.items():
        _check_shape(f"{module}{LORA_BIAS}", bias, (tensors.pairs[module][1].shape[0],))
    return given


def _check_shape(name: str, bias: torch.Tensor, shape: tuple[int, ...]) -> None:
    if tuple(bias.shape) != tuple(shape):
        raise AdapterInvalidError(f"tensor {name}: is {list(bias.shape)}, the base needs {list(shape)}")
