"""The wire contract: generated code matches the .proto files, and the API keeps its promises."""

import runpy
import shutil
import subprocess
from pathlib import Path

import pytest
from google.protobuf.descriptor import FieldDescriptor
from hotswap.v1 import adapters_pb2, common_pb2, inference_pb2

ROOT = Path(__file__).resolve().parents[2]
FILES = [common_pb2, inference_pb2, adapters_pb2]


def test_generated_code_has_not_drifted():
    drift = runpy.run_path(str(ROOT / "proto" / "generate.py"))["drift"]
    assert drift() == []


def test_drift_names_a_stale_a_missing_and_a_leftover_file(tmp_path):
    shutil.copytree(ROOT / "proto", tmp_path / "proto")
    package = tmp_path / "proto" / "hotswap" / "v1"
    (package / "common_pb2.py").write_text("")
    (package / "adapters_pb2.pyi").unlink()
    (package / "gone_pb2.py").write_text("")
    drift = runpy.run_path(str(tmp_path / "proto" / "generate.py"))["drift"]
    assert drift() == ["adapters_pb2.pyi", "common_pb2.py", "gone_pb2.py"]


@pytest.mark.skipif(shutil.which("buf") is None, reason="buf is not installed")
def test_buf_lint_passes():
    result = subprocess.run(["buf", "lint"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_every_rpc_of_the_design_is_there():
    rpcs = {
        name: [method.name for method in service.methods]
        for module in FILES
        for name, service in module.DESCRIPTOR.services_by_name.items()
    }
    assert rpcs == {
        "InferenceService": ["Generate", "GenerateStream", "Score", "Tokenize"],
        "AdapterService": [
            "ListAdapters",
            "GetAdapter",
            "LoadAdapter",
            "UnloadAdapter",
            "PinAdapter",
            "UnpinAdapter",
            "MergeAdapter",
            "UnmergeAdapter",
            "CalibrateMethods",
        ],
    }


def test_every_scalar_of_sampling_tells_absent_from_zero():
    for field in inference_pb2.SamplingParams.DESCRIPTOR.fields:
        assert field.is_repeated or field.has_presence, field.name


def test_generate_and_generate_stream_take_the_same_fields():
    def shape(message) -> list[tuple[int, str, int, object]]:
        return [(f.number, f.name, f.type, f.message_type) for f in message.DESCRIPTOR.fields]

    assert shape(inference_pb2.GenerateRequest) == shape(inference_pb2.GenerateStreamRequest)


def test_no_request_field_is_a_path_or_bytes():
    requests = [
        message
        for module in FILES
        for name, message in module.DESCRIPTOR.message_types_by_name.items()
        if name.endswith("Request")
    ]
    assert len(requests) == 13
    for message in requests:
        for field in message.fields:
            assert field.type != FieldDescriptor.TYPE_BYTES, field.full_name
            assert "path" not in field.name.split("_"), field.full_name
