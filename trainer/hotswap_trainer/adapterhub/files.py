"""The weights of AdapterHub's checkpoints, read without running code, and the output layer beside them."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import TYPE_CHECKING

from hotswap_trainer.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS = ("adapter.safetensors", "pytorch_adapter.bin")
HEADS = ("model_head.safetensors", "pytorch_model_head.bin")


def read_tensors(directory: Path, names: tuple[str, ...]) -> dict[str, Tensor]:
    """The tensors of the first of these files that is there.

    Raises:
        CheckpointError: none is there, or it is broken or holds something else than tensors.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = next((directory / name for name in names if (directory / name).exists()), None)
    if path is None:
        raise CheckpointError(f"{directory}: holds neither {' nor '.join(names)}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise CheckpointError(
            f"{path.name}: is broken, or holds more than tensors: {str(error).partition(chr(10))[0]}"
        ) from error
    if not isinstance(content, dict) or not all(isinstance(v, torch.Tensor) for v in content.values()):
        raise CheckpointError(f"{path.name}: must hold tensors by name and nothing else")
    return content


def check_head(directory: Path, base: Path | None) -> None:
    """AdapterHub saves the output layer beside the adapter, and may have trained it: it must be the base's.

    Raises:
        CheckpointError: it is another one, or `base` is not given to compare it with.
    """
    import torch
    from safetensors import safe_open

    file = next((name for name in HEADS if (directory / name).exists()), None)
    if file is None:
        return
    head = read_tensors(directory, HEADS)
    if set(head) != {"lm_head.weight"}:
        raise CheckpointError(f"{file}: holds a prediction head ({', '.join(head)}), which is not supported")
    remedy = "or save the adapter again with with_head=False"
    if base is None:
        raise CheckpointError(
            f"{file}: may be a trained output layer; give --base to compare it with the base's, {remedy}"
        )
    for key in ("lm_head.weight", "model.embed_tokens.weight"):  # the latter where they are tied
        for path in sorted(base.glob("*.safetensors")):
            with safe_open(path, framework="pt") as weights:
                if key in weights.keys():  # noqa: SIM118
                    own = weights.get_tensor(key)
                    saved = head["lm_head.weight"]
                    if own.shape == saved.shape and torch.equal(own.to(saved.dtype), saved):
                        return
                    raise CheckpointError(
                        f"{file}: the output layer is not the base's own, so it was trained"
                    )
    raise CheckpointError(f"--base: {base} holds no output layer to compare {file} with; {remedy}")
