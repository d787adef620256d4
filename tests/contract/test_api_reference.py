"""docs/api.md is what the .proto files say: written by proto/reference.py, complete, and not out of date."""

import re
import runpy
import shutil
from pathlib import Path

import pytest
from hotswap.v1 import adapters_pb2, common_pb2, inference_pb2

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = "proto/reference.py"
FILES = [common_pb2, inference_pb2, adapters_pb2]


@pytest.fixture(scope="module")
def page() -> str:
    return (ROOT / "docs" / "api.md").read_text(encoding="utf-8")


def test_the_page_has_not_drifted(page):
    assert runpy.run_path(str(ROOT / SCRIPT))["render"]() == page


def test_a_changed_comment_is_drift_until_the_page_is_written(tmp_path, capsys):
    shutil.copytree(ROOT / "proto", tmp_path / "proto")
    (tmp_path / "docs").mkdir()
    proto = tmp_path / "proto/hotswap/v1/common.proto"
    proto.write_text(proto.read_text().replace("// A sequence of token ids.", "// Some ids | a few.", 1))
    main = runpy.run_path(str(tmp_path / SCRIPT))["main"]
    assert main(["--check"]) == 1
    assert "make proto" in capsys.readouterr().err
    assert main([]) == 0
    assert main(["--check"]) == 0
    assert "Some ids | a few." in (tmp_path / "docs/api.md").read_text()


def test_every_element_is_on_the_page_with_its_comment(page):
    sections = dict(re.findall(r"^###+ (\w+)\n\n(.*?)(?=^##|\Z)", page, re.MULTILINE | re.DOTALL))
    for module in FILES:
        for name, message in module.DESCRIPTOR.message_types_by_name.items():
            rows = re.findall(r"^\| (\d+) \| `(\w+)` \| .+ \| (.+) \|$", sections[name], re.MULTILINE)
            assert [(int(number), field) for number, field, _ in rows] == [
                (field.number, field.name) for field in message.fields
            ]
        for name, enum in module.DESCRIPTOR.enum_types_by_name.items():
            rows = re.findall(r"^\| (\d+) \| `(\w+)` \| (.+) \|$", sections[name], re.MULTILINE)
            assert [(int(number), value) for number, value, _ in rows] == [
                (value.number, value.name) for value in enum.values
            ]
        for service in module.DESCRIPTOR.services_by_name.values():
            for rpc in service.methods:
                links, comment = sections[rpc.name].strip().split("\n\n", 1)
                assert f"[{rpc.input_type.name}]" in links
                assert f"[{rpc.output_type.name}]" in links
                assert comment.endswith(".")


def test_every_link_on_the_page_leads_somewhere(page):
    anchors = {title.lower() for title in re.findall(r"^#+ (\w+)$", page, re.MULTILINE)}
    assert set(re.findall(r"\]\(#(\w+)\)", page)) <= anchors
