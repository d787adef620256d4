"""Write docs/api.md, the reference of the API, from the comments of the .proto files.

`python proto/reference.py` writes; `python proto/reference.py --check` changes nothing and exits 1 where the
page differs from what would be written.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    ServiceDescriptorProto,
)
from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent
PACKAGE = Path("hotswap/v1")
PAGE = ROOT.parent / "docs" / "api.md"
FILES = ("inference.proto", "adapters.proto", "common.proto")  # in the order of a reader's interest

# Numbers of descriptor.proto: where in a file something is declared, as its source info says it.
_FILE, _MESSAGE, _ENUM, _SERVICE = (12,), 4, 5, 6
_FIELD, _ONEOF, _VALUE, _METHOD = 2, 8, 2, 2

_HEAD = """# The API

<!-- Written by `make proto` from proto/hotswap/v1/*.proto: change the comments there. -->

gRPC, package `hotswap.v1`; the files themselves are in [proto/hotswap/v1](../proto/hotswap/v1).
`hotswap_client` speaks it for Python. Operators find [errors](operating.md#errors) listed, and
[who may call what](security.md#roles).

A field is optional where its type says so: then absent differs from zero. Fields of one `oneof` exclude
each other.
"""


@dataclass(frozen=True, slots=True)
class Source:
    """A .proto file, and its comments by the path of what they stand before."""

    file: FileDescriptorProto
    comments: dict[tuple[int, ...], str] = field(repr=False)

    @classmethod
    def of(cls, file: FileDescriptorProto) -> Source:
        found = {
            tuple(place.path): place.leading_comments or "".join(place.leading_detached_comments)
            for place in file.source_code_info.location
        }
        return cls(file, {path: _joined(text) for path, text in found.items() if text.strip()})

    def comment(self, *path: int) -> str:
        return self.comments.get(path, "")


def render() -> str:
    """The page, as Markdown."""
    sources = [Source.of(file) for file in _described()]
    index = "\n".join(
        f"- [{service.name}](#{service.name.lower()}): "
        + ", ".join(f"[{rpc.name}](#{rpc.name.lower()})" for rpc in service.method)
        for source in sources
        for service in source.file.service
    )
    sections = [_section(source) for source in sources]
    return "\n\n".join([_HEAD + "\n" + index, *sections]) + "\n"


def _described() -> list[FileDescriptorProto]:
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory) / "api.binpb"
        protos = [str(PACKAGE / name) for name in FILES]
        flags = ["--include_source_info", f"--descriptor_set_out={output}"]
        if code := protoc.main(["protoc", f"-I{ROOT}", *flags, *protos]):
            sys.exit(code)
        files = {
            Path(file.name).name: file for file in FileDescriptorSet.FromString(output.read_bytes()).file
        }
    return [files[name] for name in FILES]


def _section(source: Source) -> str:
    file = source.file
    parts = [f"## {file.name}", source.comment(*_FILE)]
    for index, service in enumerate(file.service):
        parts += _service(source, service, index)
    for index, message in enumerate(file.message_type):
        parts += _message(source, message, index)
    for index, enum in enumerate(file.enum_type):
        parts += _enum(source, enum, index)
    return "\n\n".join(part for part in parts if part)


def _service(source: Source, service: ServiceDescriptorProto, index: int) -> Iterator[str]:
    yield f"### {service.name}"
    yield source.comment(_SERVICE, index)
    for number, rpc in enumerate(service.method):
        streams = "stream " if rpc.server_streaming else ""
        yield f"#### {rpc.name}"
        yield f"{_link(rpc.input_type)} → {streams}{_link(rpc.output_type)}"
        yield source.comment(_SERVICE, index, _METHOD, number)


def _message(source: Source, message: DescriptorProto, index: int) -> Iterator[str]:
    yield f"### {message.name}"
    yield source.comment(_MESSAGE, index)
    rows = [
        (
            str(item.number),
            f"`{item.name}`",
            _type(message, item),
            source.comment(_MESSAGE, index, _FIELD, number),
        )
        for number, item in enumerate(message.field)
    ]
    if rows:
        yield _table(("", "field", "type", ""), rows)


def _enum(source: Source, enum: EnumDescriptorProto, index: int) -> Iterator[str]:
    yield f"### {enum.name}"
    yield source.comment(_ENUM, index)
    rows = [
        (str(value.number), f"`{value.name}`", source.comment(_ENUM, index, _VALUE, number))
        for number, value in enumerate(enum.value)
    ]
    yield _table(("", "value", ""), rows)


def _type(message: DescriptorProto, item: FieldDescriptorProto) -> str:
    entries = {entry.name: entry for entry in message.nested_type if entry.options.map_entry}
    if (entry := entries.get(item.type_name.rpartition(".")[2])) is not None:
        key, value = (_plain(part) for part in entry.field)
        return f"map of {key} to {value}"
    if item.label == FieldDescriptorProto.LABEL_REPEATED:
        return f"repeated {_plain(item)}"
    if item.proto3_optional:
        return f"optional {_plain(item)}"
    if item.HasField("oneof_index"):
        return f"{_plain(item)}, oneof `{message.oneof_decl[item.oneof_index].name}`"
    return _plain(item)


def _plain(item: FieldDescriptorProto) -> str:
    if item.type_name:
        return _link(item.type_name)
    return FieldDescriptorProto.Type.Name(item.type).removeprefix("TYPE_").lower()


def _link(type_name: str) -> str:
    name = type_name.rpartition(".")[2]
    return f"[{name}](#{name.lower()})"


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *(tuple(cell.replace("|", "\\|") for cell in row) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _joined(comment: str) -> str:
    """A comment's lines as paragraphs of one line each."""
    paragraphs = re.split(r"\n\s*\n", comment.strip())
    return "\n\n".join(" ".join(line.strip() for line in paragraph.splitlines()) for paragraph in paragraphs)


def main(arguments: list[str]) -> int:
    if arguments not in ([], ["--check"]):
        print("usage: reference.py [--check]", file=sys.stderr)
        return 2
    page = render()
    if arguments:
        stale = not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != page
        if stale:
            print("docs/api.md has drifted from the .proto files: run `make proto`", file=sys.stderr)
        return int(stale)
    PAGE.write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
