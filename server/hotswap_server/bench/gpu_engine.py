"""What the whole engine adds to the steps of a device: its host's part of a step, and swaps beside others."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from hotswap_server.adapters import synthetic
from hotswap_server.bench.mix import MixCase, save_adapter
from hotswap_server.bench.ours import EngineSide
from hotswap_server.bench.steps import StepBench
from hotswap_server.bench.workload import ALL_LINEAR, make_prompts, percentiles
from hotswap_server.engine.base import BaseModel
from hotswap_server.engine.engine import EngineOptions
from hotswap_server.engine.kv_cache import PagedKVCache

CONTEXT: Final = 512
RANK: Final = 16
_REQUESTS, _NEW_TOKENS, _SHORT = 32, 64, 32
_LORAS = ("bench/first", "bench/second", "bench/third")
_SLOTS = 2  # one may be merged
_SAMPLES = 8

Tell = Callable[[str], None]


def measure_engine(base: BaseModel, tell: Tell, answered: Callable[[], None]) -> dict[str, float]:
    """The engine over 32 requests; `answered` is called after the first answers. All times in milliseconds,
    but `seconds_to_record`."""
    tell("recording graphs")
    prompts = make_prompts(_REQUESTS, CONTEXT - 1, base.vocab_size, 0)
    case, merged = MixCase("base", _REQUESTS, (None,)), MixCase("merged", _REQUESTS, _LORAS[:1], merged=True)
    figures: dict[str, float] = {"requests": _REQUESTS}
    with tempfile.TemporaryDirectory(prefix="hotswap-bench-") as directory:
        store, tokenizer = Path(directory), _tokenizer(base.vocab_size)
        for name in _LORAS:
            config, tensors = synthetic.lora(base, RANK, ALL_LINEAR)
            save_adapter(store / name, config, {key: t.to(base.dtype) for key, t in tensors.items()})
        began = time.perf_counter()
        side = EngineSide(base, tokenizer, store, _SLOTS, RANK, _options(base))
        figures["seconds_to_record"] = time.perf_counter() - began
        try:
            tell("decoding with the whole engine")
            side.run(case, prompts, 8)
            answered()
            figures["step_ms"] = _step_ms(side, case, prompts)
            figures |= _measure_first_tokens(side, base, tell)
            tell("merging")
            side.merge(_LORAS[0])
            figures["merged_step_ms"] = _step_ms(side, merged, prompts)
            side.merge(None)
            tell("decoding without a step ahead")
            side.wait_for_each_step()
            figures["waiting_step_ms"] = _step_ms(side, case, prompts)
        finally:
            side.close()
    base.detach_adapters()
    bench = StepBench(base, CONTEXT + _NEW_TOKENS // 2, _REQUESTS)
    figures["device_ms"] = bench.decode("as in the engine", _REQUESTS).ms
    return figures


def _measure_first_tokens(side: EngineSide, base: BaseModel, tell: Tell) -> dict[str, float]:
    """Of a short prompt with a LoRA on all linears, while all other places decode: `ttft_ms` where it has a
    slot, and `ttft_swapped_ms` where others have them all."""
    tell("first tokens")
    beside = make_prompts(_REQUESTS - 1, _SHORT, base.vocab_size, 1)
    [prompt] = make_prompts(1, _SHORT, base.vocab_size, 2)
    with side.decoding(beside, CONTEXT + _NEW_TOKENS - _SHORT):
        for name in _LORAS:  # which records the graphs, and brings all to host memory
            side.first_token(name, prompt)
        resident = [side.first_token(_LORAS[-1], prompt) for _ in range(_SAMPLES)]
        swapped = [side.first_token(_LORAS[number % 3], prompt) for number in range(_SAMPLES)]
    return {
        "ttft_ms": statistics.median(resident) * 1e3,
        "ttft_swapped_ms": statistics.median(swapped) * 1e3,
    }


def _step_ms(side: EngineSide, case: MixCase, prompts: list[list[int]]) -> float:
    side.run(case, prompts, 4)
    return percentiles(side.run(case, prompts, _NEW_TOKENS).inter_token)[0] * 1e3


def _options(base: BaseModel) -> EngineOptions:
    page_bytes = PagedKVCache.bytes_per_page(base.attention, 16, base.dtype)
    pages = _REQUESTS * (-(-(CONTEXT + _NEW_TOKENS) // 16) + 1)
    return EngineOptions(
        kv_cache_bytes=pages * page_bytes,
        max_batch_tokens=16 * CONTEXT,
        max_context=CONTEXT + _NEW_TOKENS,
    )


def _tokenizer(vocab_size: int) -> Any:
    """One token per id, for engines of random weights."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {f"t{index} ": index for index in range(vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="t0 "))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)  # type: ignore[no-untyped-call]
