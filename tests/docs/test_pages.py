"""What the pages say can be done: commands, flags, names and links exist, and every block runs as it stands.

The ordinary test runs the blocks over a tiny random base that stands for `smollm2`, with free ports for 50051
and 9400, the plain torch kernels, and a `hotswap` that starts at once; nothing else of a block is changed.
The slow one runs them with the real command and weights.
"""

import ast
import importlib
import os
import re
import shutil
import socket
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from support import warm
from support.pages import (
    OUTPUT,
    PYTHON,
    ROOT,
    SHELL,
    Block,
    Reader,
    base_environment,
    blocks,
    commands,
    matches,
)

PAGES = sorted(
    [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *(ROOT / "docs").rglob("*.md"),
        *ROOT.glob("deploy/**/*.md"),
    ]
)
# Blocks that no test runs, by page, each with its reason beside it. A further one is a decision.
NOT_RUN = {
    "CONTRIBUTING.md": 1,
    "README.md": 3,
    "docs/fleet.md": 3,
    "docs/scaling.md": 4,
    "docs/security.md": 2,
}
OTHER_LANGUAGES = {OUTPUT, "yaml", "json", "promql"}
ALL = [block for page in PAGES for block in blocks(page)]
RUN = [block for block in ALL if block.language in (SHELL, PYTHON) and block.reason is None]
RUN_PAGES = list(dict.fromkeys(block.page for block in RUN))
LONG = {
    *(ROOT / "docs" / "methods").glob("*.md"),
    ROOT / "docs" / "planning.md",
    ROOT / "docs" / "comparing.md",
}
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def test_every_block_says_what_it_is():
    unknown = [str(block) for block in ALL if block.language not in {SHELL, PYTHON, *OTHER_LANGUAGES}]
    assert unknown == []


def test_blocks_that_are_not_run_are_counted():
    found: dict[str, list[Block]] = {}
    for block in ALL:
        if block.reason is not None:
            found.setdefault(name_of(block.page), []).append(block)
    listed = "\n".join(f"{block}: {block.reason}" for group in found.values() for block in group)
    print(listed)
    assert {page: len(group) for page, group in found.items()} == NOT_RUN, listed


def shell_commands() -> Iterator[tuple[str, list[str]]]:
    """Commands of all blocks, run or not, and those in running text."""
    for block in ALL:
        if block.language == SHELL:
            for words in commands(block.text):
                yield str(block), words
    for page in PAGES:
        if page.name == "notebook.md":  # says what was run then, and is never corrected
            continue
        text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        for inline in re.findall(r"(?<!`)`((?:hotswap|make) [^`]+)`(?!`)", text.replace("\n", " ")):
            yield name_of(page), inline.replace("|", " ").replace("'", "").split()


def hotswap_command(words: list[str]) -> tuple[Any, list[str]]:
    """The command that `words` name, and the words after its name."""
    from hotswap_client.cli._app import app

    command: Any = typer.main.get_command(app)
    context = typer.Context(command, info_name="hotswap")
    rest = words[1:]
    while hasattr(command, "resolve_command") and rest and not rest[0].startswith("-"):
        name, command, rest = command.resolve_command(context, rest)
        context = typer.Context(command, info_name=name, parent=context)
    return command, rest


def test_every_command_that_is_shown_exists_with_its_flags():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    wrong, seen = [], 0
    for where, words in shell_commands():
        if words[0] == "make" and (missing := {w for w in words[1:] if "=" not in w} - targets):
            wrong.append(f"{where}: make has no {missing}")
        if words[0] != "hotswap":
            continue
        seen += 1
        try:
            command, rest = hotswap_command(words)
        except Exception as error:  # a typer of its own version: what it raises for no such command
            wrong.append(f"{where}: {' '.join(words)}: {error}")
            continue
        known = {"--help", *(flag for p in command.params for flag in (*p.opts, *p.secondary_opts))}
        flags = {word.partition("=")[0] for word in rest if word.startswith("--") and len(word) > 2}
        wrong += [f"{where}: {' '.join(words[:3])} has no {flag}" for flag in sorted(flags - known)]
    assert wrong == []
    assert seen > 30


@pytest.mark.parametrize("words", [["hotswap", "adapters", "aliass"], ["hotswap", "trane"]])
def test_a_command_that_is_not_there_is_noticed(words):
    with pytest.raises(Exception, match=words[-1]):
        hotswap_command(words)


def test_files_of_the_repository_that_are_shown_exist():
    for page in PAGES:
        if page.name != "notebook.md":
            for path in re.findall(
                r"(?<![\w/.])(?:deploy|examples|tests|proto)/[\w./-]*\w/?", page.read_text()
            ):
                assert (ROOT / path).exists(), (name_of(page), path)


def test_build_arguments_that_are_shown_exist():
    arguments = set(re.findall(r"^ARG (\w+)", (ROOT / "Dockerfile").read_text(), re.MULTILINE))
    assert {"VARIANT", "EXTRAS", "TORCH_INDEX_ARGS"} <= arguments
    for block in ALL:
        assert set(re.findall(r"--build-arg (\w+)", block.text)) <= arguments, str(block)


def test_extras_that_are_shown_exist():
    extras = set(PROJECT["optional-dependencies"])
    for page in PAGES:
        for names in re.findall(r"(?:hotswap|\.)\[([a-z0-9,]+)\]", page.read_text()):
            assert set(names.split(",")) <= extras, (name_of(page), names)


@pytest.mark.parametrize("block", [block for block in ALL if block.language == PYTHON], ids=str)
def test_python_that_is_shown_names_what_there_is(block):
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.ImportFrom) and node.module:
            module = importlib.import_module(node.module)
            assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


def anchors(page: Path) -> set[str]:
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


def test_the_index_leads_to_every_page():
    index = (ROOT / "docs" / "README.md").read_text()
    linked = {
        (ROOT / "docs" / link.partition("#")[0]).resolve() for link in re.findall(r"\]\(([^)\s]+)\)", index)
    }
    assert [
        name_of(page)
        for page in (ROOT / "docs").rglob("*.md")
        if page.name != "README.md" and page not in linked
    ] == []


def test_commands_are_found_in_shell():
    text = "cat > a <<'END'\nhotswap no\nEND\nA=1 && hotswap train \\\n  --name x/y # so\necho 'a;b' | wc\n"
    assert list(commands(text)) == [
        ["cat", ">", "a"],
        ["A=1"],
        ["hotswap", "train", "--name", "x/y"],
        ["echo", "a;b"],
        ["wc"],
    ]


@pytest.mark.parametrize(
    ("expected", "printed", "same"),
    [
        ("a … c\n", "a b c", True),
        ("a …\nlast", "a 1\n2\nlast\n", True),
        ("a … c", "a b d", False),
        ("a", "a\nb", False),
    ],
)
def test_output_is_compared_but_for_ellipses(expected, printed, same):
    assert matches(expected, printed) is same


def test_a_block_that_fails_or_prints_something_else_is_noticed(tmp_path):
    page = ROOT / "README.md"
    with Reader(tmp_path, base_environment(), {}, real=False) as reader:
        reader.read(Block(page, 1, SHELL, "export A=b; mkdir c; cd c\n"))
        reader.read(Block(page, 2, SHELL, "echo $A; basename $PWD\n", output="b\nc\n"))
        reader.read(Block(page, 3, SHELL, "echo x\n", output="y\n", of_weights=True))
        with pytest.raises(AssertionError, match="The page shows"):
            reader.read(Block(page, 4, SHELL, "echo x\n", output="y\n"))
        with pytest.raises(AssertionError, match="exit status 1"):
            reader.read(Block(page, 5, SHELL, "false\n"))
        with pytest.raises(AssertionError, match="exit status 1"):
            reader.read(Block(page, 6, PYTHON, "raise SystemExit(1)\n"))


def free_ports() -> dict[str, str]:
    """Free ports, by those that pages name."""
    with socket.socket() as first, socket.socket() as second:
        first.bind(("127.0.0.1", 0))
        second.bind(("127.0.0.1", 0))
        return {"50051": str(first.getsockname()[1]), "9400": str(second.getsockname()[1])}


def ports_in(environment: dict[str, str], ports: dict[str, str]) -> dict[str, str]:
    """With the ports as defaults of server and client."""
    return environment | {
        "HOTSWAP_SERVE_PORT": ports["50051"],
        "HOTSWAP_SERVE_METRICS_PORT": ports["9400"],
        "HOTSWAP_TARGET": f"localhost:{ports['50051']}",
    }


@pytest.fixture
def tiny_cache(tiny_base, tmp_path, monkeypatch) -> Path:
    """A cache directory in which the embedded base, once converted, is the tiny one."""
    from hotswap import bases

    def convert(_: Path, directory: Path, progress: bool) -> None:
        shutil.copytree(tiny_base, directory, dirs_exist_ok=True)

    monkeypatch.setattr(bases, "_convert", convert)
    bases.resolve_base("smollm2", cache_dir=tmp_path / "cache" / "bases", progress=False)
    return tmp_path / "cache"


@pytest.fixture
def warm_hotswap(tmp_path) -> Iterator[Path]:
    """A directory for PATH whose `hotswap` starts at once."""
    path, script = str(tmp_path / "warm"), warm.__file__
    environment = base_environment()
    with subprocess.Popen(
        [sys.executable, script, "serve", path], stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "warm\n"
            folder = tmp_path / "bin"
            folder.mkdir()
            command = folder / "hotswap"
            command.write_text(f'#!/bin/sh\nexec {sys.executable} -S -E {script} call {path} "$@"\n')
            command.chmod(0o755)
            yield folder
        finally:
            process.terminate()


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "pages",
    [
        [page for page in RUN_PAGES if page not in LONG],
        pytest.param([page for page in RUN_PAGES if page in LONG], marks=pytest.mark.slow),
    ],
    ids=["short", "long"],
)
def test_the_pages_run_as_they_stand(pages, tmp_path, tiny_cache, warm_hotswap, subtests):
    for page in pages:
        ports = free_ports()
        environment = base_environment(
            PATH=f"{warm_hotswap}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            HOTSWAP_CACHE_DIR=str(tiny_cache),
            HOTSWAP_SERVE_KERNELS="reference",
        )
        with subtests.test(name_of(page)):
            read_page(page, tmp_path / page.stem, ports_in(environment, ports), ports, real=False)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("page", RUN_PAGES, ids=name_of)
def test_the_page_runs_with_real_weights(page, tmp_path):
    ports = free_ports()
    environment = base_environment(PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    read_page(page, tmp_path / page.stem, ports_in(environment, ports), ports, real=True)


def read_page(
    page: Path, directory: Path, environment: dict[str, str], ports: dict[str, str], *, real: bool
) -> None:
    directory.mkdir()
    if page.parent.name == "methods":  # their commands take what the tutorial has written
        [data] = [
            block for block in RUN if block.page.name == "tutorial.md" and "> tickets.jsonl" in block.text
        ][:1]
        written = re.search(r"cat > tickets.jsonl <<'END'\n(.*?)^END$", data.text, re.MULTILINE | re.DOTALL)
        assert written is not None
        (directory / "tickets.jsonl").write_text(written[1])
    with Reader(directory, environment, ports, real=real) as reader:
        for block in RUN:
            if block.page == page:
                reader.read(block)
