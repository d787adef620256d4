"""Damaged and hostile adapters of every method: each loads whole, or is refused with a typed error."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hotswap_server.adapters.finite import check_finite
from hotswap_server.adapters.manager import AdapterManager
from hotswap_server.adapters.method import BankOptions, available_methods
from hotswap_server.errors import AdapterInvalidError, AdapterNotFoundError, CapacityError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.adapters import write_bottleneck, write_ia3, write_lora, write_prefix

NAME = "tenant/fuzzed"
HANGS_S = 60
# What has no configuration is no version; everything else is the adapter's fault, or its size.
REFUSALS = (AdapterInvalidError, AdapterNotFoundError, CapacityError)
VALID = {
    "lora": lambda model, path: write_lora(
        model,
        path,
        r=3,
        target_modules=["q_proj", "down_proj"],
        rank_pattern={"down_proj": 2},
        alpha_pattern={"layers.1.mlp.down_proj": 5},
    ),
    "dora": lambda model, path: write_lora(model, path, r=2, target_modules="all-linear", use_dora=True),
    "regex": lambda model, path: write_lora(
        model, path, r=2, target_modules=r".*\.layers\.1\..*v_proj", exclude_modules=["k_proj"]
    ),
    "layers": lambda model, path: write_lora(
        model, path, r=2, target_modules=["v_proj"], layers_to_transform=[1], layers_pattern="layers"
    ),
    "ia3": lambda model, path: write_ia3(
        model, path, target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "prefix": lambda model, path: write_prefix(model, path, 3),
    "bottleneck": lambda model, path: write_bottleneck(model, path, bottleneck_size=4),
}


@pytest.fixture(scope="module")
def valid(llama, tmp_path_factory) -> dict[str, tuple[dict[str, Any], bytes]]:
    """Configuration and weights of a valid adapter of each kind."""
    found = {}
    for kind, write in VALID.items():
        directory = write(llama, tmp_path_factory.mktemp(kind))
        found[kind] = (
            json.loads((directory / "adapter_config.json").read_text()),
            (directory / "adapter_model.safetensors").read_bytes(),
        )
    return found


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("secret-place")


@pytest.fixture(scope="module")
def manager(llama_base, store):
    options = BankOptions(num_slots=2, max_lora_rank=8, max_bottleneck_size=8)
    manager = AdapterManager(AdapterManager.open_store(str(store)), llama_base, options)
    yield manager
    manager.close()


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 40)
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(
        ["LORA", "(", "(.*)*(.*)*x", ".*", "q_proj", "all-linear", "", "1" * 5000, "../../etc"]
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)
FIELDS = (
    *(
        "peft_type",
        "task_type",
        "r",
        "lora_alpha",
        "target_modules",
        "exclude_modules",
        "rank_pattern",
        "bias",
    ),
    *("alpha_pattern", "use_rslora", "use_dora", "layers_to_transform", "layers_pattern", "modules_to_save"),
    *("init_lora_weights", "feedforward_modules", "num_virtual_tokens", "num_layers", "token_dim", "encoder"),
    *("bottleneck_size", "non_linearity", "reduction_factor", "scaling", "placement", "num_attention_heads"),
)


@st.composite
def changed_configs(draw, config: dict[str, Any]) -> bytes:
    changed = dict(config)
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(sorted({*changed, *FIELDS})) | st.text(max_size=6))
        if draw(st.integers(0, 4)) == 0:
            changed.pop(name, None)
        elif isinstance(changed.get(name), dict | list) and draw(st.booleans()):
            changed[name] = draw(st.lists(json_values, max_size=3) | json_values)
        else:
            changed[name] = draw(json_values)
    return json.dumps(changed).encode("utf-8", "surrogatepass")


@st.composite
def changed_bytes(draw, data: bytes) -> bytes:
    """Bytes flipped, cut, or repeated; most often near the beginning, where formats say what follows."""
    changed = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, min(len(changed), 300)) | st.integers(0, len(changed)))
        kind = draw(st.sampled_from(["set", "cut", "repeat", "insert"]))
        if kind == "set" and start < len(changed):
            changed[start] = draw(st.integers(0, 255))
        elif kind == "cut":
            del changed[start : start + draw(st.integers(1, 64) | st.just(len(changed)))]
        elif kind == "repeat":
            changed[start:start] = changed[start : start + draw(st.integers(1, 64))]
        else:
            changed[start:start] = draw(st.binary(max_size=16))
    return bytes(changed)


@st.composite
def changed_headers(draw, data: bytes) -> bytes:
    """A safetensors file whose header says something else."""
    (length,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + length]), bytearray(data[8 + length :])
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(sorted(header)))
        entry = header[name]
        kind = draw(st.sampled_from(["drop", "rename", "copy", "field", "value", "shape", "body"]))
        if kind == "drop" and len(header) > 1:
            del header[name]
        elif kind in ("rename", "copy"):
            other = draw(st.sampled_from(sorted(header)) | st.text(max_size=12))
            other = draw(st.sampled_from([other, name.replace("lora_A", "lora_B"), name + "x"]))
            header[other] = entry if kind == "copy" else header.pop(name)
        elif kind == "field" and isinstance(entry, dict):
            field = draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
            header[name] = entry | {field: draw(json_values | st.lists(st.integers(), max_size=3))}
        elif kind == "value" and isinstance(entry, dict):
            dtypes = ["F64", "F32", "F16", "BF16", "I64", "I8", "U8", "BOOL", "F8_E4M3", "C64"]
            header[name] = entry | {"dtype": draw(st.sampled_from(dtypes))}
        elif kind == "shape" and isinstance(entry, dict) and isinstance(entry.get("shape"), list):
            header[name] = entry | {
                "shape": draw(st.permutations(entry["shape"])) + draw(st.sampled_from([[], [1]]))
            }
        elif body:
            floats = [b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f", b"\xff\xff\x7f\x7f", b"\x01\x00\x00\x00"]
            start = 4 * draw(st.integers(0, len(body) // 4 - 1))
            body[start : start + 4] = draw(st.sampled_from(floats))
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + bytes(body)


@dataclass(frozen=True)
class Files:
    """An adapter's two files; the weights' bytes are too many to show."""

    config: bytes
    weights: bytes = field(repr=False)
    header: bytes = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "header", self.weights[:2000])


def load(manager: AdapterManager, store: Path, config: bytes, weights: bytes) -> bool:
    """Whether it loads; raises what is no refusal."""
    directory = store / NAME / "1"
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "adapter_config.json").write_bytes(config)
    (directory / "adapter_model.safetensors").write_bytes(weights)
    try:
        info = manager.load(NAME, None).result(HANGS_S)
    except REFUSALS as error:
        message = str(error)
        assert str(store) not in message
        assert "secret-place" not in message
        assert "Traceback" not in message
        assert "/site-packages/" not in message
        return False
    json.dumps(dict(info.details))
    adapter = manager._cache.peek(info.ref.digest)
    check_finite(adapter)  # whichever way it came into the cache
    return True


def fuzz(manager, store, valid, kind, examples) -> None:
    config, weights = valid[kind]
    plain = json.dumps(config).encode()
    assert load(manager, store, plain, weights)
    files = st.one_of(
        st.builds(Files, changed_configs(config), st.just(weights)),
        st.builds(Files, changed_bytes(plain), st.just(weights)),
        st.builds(Files, st.just(plain), changed_bytes(weights)),
        st.builds(Files, st.just(plain), changed_headers(weights)),
    )

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
    )
    @given(files)
    def attempt(changed):
        load(manager, store, changed.config, changed.weights)

    attempt()
    assert load(manager, store, plain, weights)


@pytest.mark.parametrize("kind", VALID)
def test_what_is_not_a_whole_adapter_is_refused(manager, store, valid, kind):
    fuzz(manager, store, valid, kind, 40)


@pytest.mark.slow
@pytest.mark.parametrize("kind", VALID)
def test_what_is_not_a_whole_adapter_is_refused_at_length(manager, store, valid, kind):
    fuzz(manager, store, valid, kind, 3000)


def test_every_method_is_fuzzed(manager, store, valid):
    methods = set()
    for config, weights in valid.values():
        assert load(manager, store, json.dumps(config).encode(), weights)
        methods.add(manager.get(NAME, None).ref.method)
    assert methods == set(available_methods())
