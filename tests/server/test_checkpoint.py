import io
import json
import pickle
import struct

import pytest
import torch
from hotswap.layout import content_digest
from hotswap_server.adapters.checkpoint import (
    AdapterChangedError,
    parse_checkpoint,
    parse_config,
    parse_weights,
)
from hotswap_server.core import AdapterRef
from hotswap_server.errors import AdapterInvalidError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

CONFIG = json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 1.5, "target_modules": ["q_proj"]}).encode()
WEIGHTS = save({"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)})


def parse(config: bytes = CONFIG, weights: bytes = WEIGHTS):
    return parse_checkpoint(config, weights, AdapterRef("acme/x", 2, content_digest(config, weights), "lora"))


def safetensors_file(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def tensor_entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_both_files_arrive_as_they_were_saved():
    raw = parse()
    assert raw.config == {"peft_type": "LORA", "r": 2, "lora_alpha": 1.5, "target_modules": ["q_proj"]}
    torch.testing.assert_close(raw.tensors["a"], torch.arange(6.0).reshape(2, 3), rtol=0, atol=0)
    assert raw.tensors["b"].dtype == torch.bfloat16
    assert raw.nbytes == 6 * 4 + 2 * 2
    assert raw.ref.name == "acme/x"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_float_dtypes_keep_their_bits(dtype):
    tensor = torch.randn(3, 5).to(dtype)
    assert torch.equal(parse(weights=save({"t": tensor})).tensors["t"], tensor)


def test_large_finite_values_are_no_infinity():
    weights = save({"t": torch.full((4,), 3e38), "h": torch.full((100,), 6e4, dtype=torch.float16)})
    assert set(parse(weights=weights).tensors) == {"t", "h"}


def test_infinities_of_both_signs_do_not_cancel():
    with pytest.raises(AdapterInvalidError, match="'t' holds infinity"):
        parse(weights=save({"t": torch.tensor([float("inf"), float("-inf"), 1.0])}))


def test_a_scalar_tensor_is_read():
    assert parse(weights=save({"t": torch.tensor(2.0)})).tensors["t"].shape == ()


def test_content_of_another_digest_is_refused():
    ref = AdapterRef("acme/x", 2, content_digest(CONFIG, WEIGHTS), "lora")
    with pytest.raises(AdapterChangedError, match="acme/x@2: its files changed"):
        parse_checkpoint(CONFIG + b" ", WEIGHTS, ref)
    assert issubclass(AdapterChangedError, AdapterInvalidError)


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (b"", "not valid JSON"),
        (b"[1]", "object, not a list"),
        (b"null", "object, not a NoneType"),
        (b'{"r": 8', "not valid JSON"),
        (b'{"r": NaN}', "NaN"),
        (b'{"r": -Infinity}', "Infinity"),
        (b'{"r": 1e999}', "too large"),
        (b'{"r": 8, "r": 16}', "'r' appears twice"),
        (b'{"a": {"r": 8, "r": 16}}', "'r' appears twice"),
        (b'{"r": "\xff"}', "utf-8"),
        ('{"r": 8}'.encode("utf-16"), "utf-8"),
        (b'{"r": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b'{"r": ' + b"9" * 10_000 + b"}", "not valid JSON"),
        (pickle.dumps({"r": 8}), "not valid JSON|utf-8"),
    ],
)
def test_a_broken_config_is_refused(config, why):
    with pytest.raises(AdapterInvalidError, match=why) as caught:
        parse_config(config, "acme/x@2")
    assert str(caught.value).startswith("acme/x@2: adapter_config.json ")


@pytest.mark.parametrize(
    ("weights", "why"),
    [
        (b"", "not a valid safetensors"),
        (b"\x00" * 7, "not a valid safetensors"),
        (WEIGHTS[:-1], "truncated"),
        (WEIGHTS[: len(WEIGHTS) // 2], "truncated"),
        (WEIGHTS + b"\x00", "not a valid safetensors"),
        (struct.pack("<Q", 2**63) + WEIGHTS[8:], "not a valid safetensors"),
        (struct.pack("<Q", 101_000_000) + b"{}", "not a valid safetensors"),
        (safetensors_file(b"[1]"), "not a valid safetensors"),
        (safetensors_file({"t": tensor_entry("F32", [2], 0, 4)}, b"\x00" * 4), "not a valid safetensors"),
        (safetensors_file({"t": tensor_entry("F32", [1], 4, 8)}, b"\x00" * 8), "not a valid safetensors"),
        (safetensors_file({"t": tensor_entry("F32", [2**40, 2**40], 0, 4)}, b"\x00" * 4), "not a valid"),
        (safetensors_file({}), "holds no tensors"),
        (safetensors_file({"t": tensor_entry("F32", [0, 4], 0, 0)}), "'t' of shape .* is empty"),
        (
            safetensors_file(
                {"a": tensor_entry("F32", [2], 0, 8), "b": tensor_entry("F32", [2], 4, 12)}, b"\x00" * 12
            ),
            "not a valid safetensors",
        ),
        (pickle.dumps({"t": [1.0]}), "is a pickle: .*convert it to safetensors"),
    ],
)
def test_broken_weights_are_refused(weights, why):
    with pytest.raises(AdapterInvalidError, match=why) as caught:
        parse_weights(weights, "acme/x@2")
    assert str(caught.value).startswith("acme/x@2: adapter_model.safetensors ")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_torch_archive_named_safetensors_is_refused_with_the_remedy(zipped):
    buffer = io.BytesIO()
    torch.save({"t": torch.zeros(2)}, buffer, _use_new_zipfile_serialization=zipped)
    with pytest.raises(AdapterInvalidError, match="convert it to safetensors"):
        parse_weights(buffer.getvalue(), "acme/x@2")


@pytest.mark.parametrize("dtype", [torch.int32, torch.int8, torch.float64, torch.bool, torch.float8_e4m3fn])
def test_a_dtype_that_no_adapter_has_is_refused_with_the_tensors_name(dtype):
    weights = save({"good": torch.ones(2), "lora.bad": torch.ones(2).to(dtype)})
    with pytest.raises(AdapterInvalidError, match=r"tensor 'lora.bad' is \w+; only F32, F16 and BF16"):
        parse_weights(weights, "acme/x@2")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("value", "kind"), [("nan", "NaN"), ("inf", "infinity"), ("-inf", "infinity")])
def test_values_that_are_not_finite_are_refused_with_the_tensors_name(dtype, value, kind):
    bad = torch.zeros(4, 4, dtype=dtype)
    bad[3, 2] = float(value)
    with pytest.raises(AdapterInvalidError, match=f"tensor 'lora.bad' holds {kind}"):
        parse_weights(save({"good": torch.ones(2), "lora.bad": bad}), "acme/x@2")


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data(), which=st.sampled_from(["config", "weights"]))
def test_damaged_bytes_raise_nothing_but_the_typed_error(data, which):
    files = {"config": bytearray(CONFIG), "weights": bytearray(WEIGHTS)}
    content = files[which]
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(content)))
        match data.draw(st.sampled_from(["flip", "cut", "insert"])):
            case "flip" if position < len(content):
                content[position] = data.draw(st.integers(0, 255))
            case "cut":
                del content[position : position + data.draw(st.integers(1, 40))]
            case _:
                content[position:position] = data.draw(st.binary(min_size=1, max_size=8))
    try:
        raw = parse(bytes(files["config"]), bytes(files["weights"]))
    except AdapterInvalidError:
        return
    assert all(torch.isfinite(tensor).all() for tensor in raw.tensors.values())


@settings(max_examples=100, deadline=None)
@given(
    header=st.recursive(
        st.none() | st.integers() | st.floats() | st.text(max_size=4),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["a", "b", "dtype", "shape", "data_offsets", "__metadata__"]), inner
            )
        ),
    ),
    data=st.binary(max_size=16),
)
def test_any_json_header_raises_nothing_but_the_typed_error(header, data):
    try:
        parse_weights(safetensors_file(header, data), "acme/x@2")
    except AdapterInvalidError:
        return
