"""Write the Python code of the .proto files beside them: messages, stubs of services, and types of both.

`python proto/generate.py` writes; `python proto/generate.py --check` changes nothing and exits 1 where the
checked-in code differs from what would be written.
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent
PACKAGE = Path("hotswap/v1")
GENERATED = "*_pb2*.py*"


def generate(output: Path) -> None:
    """Write the code of every .proto file under `output`. Exits with protoc's code if it fails."""
    protos = sorted(path.relative_to(ROOT) for path in (ROOT / PACKAGE).glob("*.proto"))
    services = [path for path in protos if re.search(r"^service ", (ROOT / path).read_text(), re.MULTILINE)]
    # The plugins are looked up on PATH; an environment need not be activated to run its own.
    scripts = Path(sys.executable).parent
    plugins = [f"--plugin={name}={scripts / name}" for name in ("protoc-gen-mypy", "protoc-gen-mypy_grpc")]
    include = [f"-I{ROOT}", *plugins]
    _protoc([*include, f"--python_out={output}", f"--mypy_out={output}", *map(str, protos)])
    _protoc([*include, f"--grpc_python_out={output}", f"--mypy_grpc_out={output}", *map(str, services)])


def drift() -> list[str]:
    """Names of generated files that are missing, left over, or differ from what `generate` writes."""
    with tempfile.TemporaryDirectory() as directory:
        generate(Path(directory))
        fresh = _contents(Path(directory))
    present = _contents(ROOT)
    return sorted(name for name in fresh.keys() | present.keys() if fresh.get(name) != present.get(name))


def _contents(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (root / PACKAGE).glob(GENERATED)}


def _protoc(arguments: list[str]) -> None:
    code = protoc.main(["protoc", *arguments])
    if code != 0:
        sys.exit(code)


def main(arguments: list[str]) -> int:
    if arguments == ["--check"]:
        stale = drift()
        if stale:
            print(f"generated code has drifted ({', '.join(stale)}): run `make proto`", file=sys.stderr)
        return 1 if stale else 0
    if arguments:
        print("usage: generate.py [--check]", file=sys.stderr)
        return 2
    for stale_file in (ROOT / PACKAGE).glob(GENERATED):
        stale_file.unlink()
    generate(ROOT)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
