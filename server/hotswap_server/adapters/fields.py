"""What all methods ask of an `adapter_config.json`: nothing with an effect may go unread."""

from __future__ import annotations

from collections.abc import Mapping, Set

from hotswap_server.errors import AdapterInvalidError

MODULE_PREFIX = "base_model.model."
"""PEFT's prefix of the base's module names in tensor names."""

# Fields of every PeftConfig that leave a trained adapter's result alone.
_COMMON = frozenset(
    {
        *(
            "peft_type",
            "auto_mapping",
            "base_model_name_or_path",
            "revision",
            "inference_mode",
            "peft_version",
        ),
        "task_type",
    }
)


def check_fields(config: Mapping[str, object], *, read: Set[str], without_effect: Set[str]) -> None:
    """Refuse every field that has a value, is not in `read` and has an effect, or none that is known.

    Raises:
        AdapterInvalidError: with the field's name.
    """
    task = config.get("task_type")
    if task not in (None, "CAUSAL_LM"):
        raise AdapterInvalidError(f"adapter_config.json: task_type {task!r} is not served, only CAUSAL_LM")
    for name, value in config.items():
        if name not in read | without_effect | _COMMON and value not in (None, False, [], {}, ""):
            raise AdapterInvalidError(
                f"adapter_config.json: {name} = {value!r} is not served; train without it"
            )


def check_targets(expected: set[str], present: set[str], suffix: str) -> None:
    """The modules that the fields select must be those that there are tensors for.

    Raises:
        AdapterInvalidError: with the module's or tensor's name.
    """
    if missing := sorted(expected - present):
        raise AdapterInvalidError(
            f"adapter_config.json: targets {missing[0]} ({len(missing)} modules), "
            "for which there are no tensors"
        )
    if unused := sorted(present - expected):
        raise AdapterInvalidError(
            f"tensor {MODULE_PREFIX}{unused[0]}{suffix}: its module is no target of adapter_config.json or "
            "no layer of the base that it could adapt, so nothing would use it"
        )
