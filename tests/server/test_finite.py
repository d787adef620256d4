"""Weights that are finite in the file and not where they are used."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hotswap_server.adapters.finite import check_finite
from hotswap_server.adapters.manager import AdapterManager
from hotswap_server.errors import AdapterInvalidError
from support.adapters import edit_config, write_lora


@dataclass(frozen=True, slots=True)
class Adapter:
    weights: dict[str, tuple[torch.Tensor, torch.Tensor]]
    count: torch.Tensor


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_tensor_is_looked_at_and_named(bad, dtype):
    good, large = torch.ones(3, 3, dtype=dtype), torch.full((4,), torch.finfo(dtype).max, dtype=dtype)
    check_finite(Adapter({"q_proj": (good, large)}, torch.tensor([1, 2])))
    broken = good.clone()
    broken[1, 2] = bad
    with pytest.raises(AdapterInvalidError, match=r"^weights v_proj: .*infinity or NaN"):
        check_finite(Adapter({"q_proj": (good, good), "v_proj": (good, broken)}, torch.tensor([1, 2])))


def test_a_lora_whose_scale_overflows_is_refused(llama, llama_base, tmp_path):
    directory = write_lora(llama, tmp_path / "acme/large/1", r=2, target_modules=["q_proj"])
    edit_config(directory, lora_alpha=1e300)
    manager = AdapterManager(AdapterManager.open_store(str(tmp_path)), llama_base)
    try:
        with pytest.raises(AdapterInvalidError, match="scale are too large"):
            manager.load("acme/large", None).result(60)
    finally:
        manager.close()
