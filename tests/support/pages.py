"""The commands that pages show: taken out of their fenced blocks, and run as a reader would run them.

A block is run unless a comment stands before it, `<!-- not run: REASON -->`. A `text` block that follows one
of shell or Python is its output; `…` in it stands for anything. Output that depends on the weights stands
after `<!-- output of SmolLM2 -->` and is compared with these alone.
"""

import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SHELL, PYTHON, OUTPUT = "sh", "python", "text"
READY = "hotswap is ready"
SOON_S = 240.0

_FENCE = re.compile(r"^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
_NOT_RUN = re.compile(r"<!-- not run: (?P<reason>[^>]+?) -->\s*\Z")
_OF_WEIGHTS = re.compile(r"<!-- output of SmolLM2 -->\s*\Z")
_HEREDOC = re.compile(r"<<-?'?(\w+)'?")


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block; `reason` says why it is not run, `output` what it prints (None: not shown)."""

    page: Path
    line: int
    language: str
    text: str
    reason: str | None = None
    output: str | None = None
    of_weights: bool = False

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def serves(self) -> bool:
        """Whether it ends with a server, which a reader gives a terminal of its own."""
        return self.language == SHELL and list(commands(self.text))[-1][:2] == ["hotswap", "serve"]


def blocks(page: Path) -> list[Block]:
    """All blocks of a page but outputs, which belong to the block before them."""
    text = page.read_text(encoding="utf-8")
    found: list[Block] = []
    end = 0
    for match in _FENCE.finditer(text):
        between = text[end : match.start()]
        end = match.end()
        language, content = match["language"], match["text"]
        of_weights = _OF_WEIGHTS.search(between) is not None
        if language == OUTPUT and found and not _OF_WEIGHTS.sub("", between).strip():
            before = found.pop()
            found.append(
                Block(
                    before.page, before.line, before.language, before.text, before.reason, content, of_weights
                )
            )
            continue
        reason = _NOT_RUN.search(between)
        line = text.count("\n", 0, match.start()) + 2
        found.append(Block(page, line, language, content, reason and reason["reason"]))
    return found


def commands(text: str) -> Iterator[list[str]]:
    """The words of each simple command of a shell block; what a here-document holds is none."""
    lines = iter(text.replace("\\\n", " ").splitlines())
    for line in lines:
        if heredoc := _HEREDOC.search(line):
            while next(lines) != heredoc[1]:
                pass
            line = _HEREDOC.sub(" ", line)
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words: list[str] = []
        for word in lexer:
            if re.fullmatch(r"[;&|()]+", word):
                yield from [words] if words else []
                words = []
            else:
                words.append(word)
        yield from [words] if words else []


class Reader:
    """Runs the blocks of one page, in one shell and one directory, beside the servers that they start."""

    def __init__(
        self, directory: Path, environment: Mapping[str, str], replaced: Mapping[str, str], *, real: bool
    ) -> None:
        self._directory = directory
        self._state = directory.parent / f"{directory.name}.state"
        self._environment = dict(environment)
        self._replaced = dict(replaced)
        self._real = real
        self._server: _Server | None = None

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def read(self, block: Block) -> None:
        """Run a block and hold it to what the page says it prints."""
        text = block.text
        for old, new in self._replaced.items():
            text = text.replace(old, new)
        if block.serves:
            self._stop()
            self._server = _Server(self._shell(text, last=True), self._directory, self._environment, block)
            return
        command = self._shell(text) if block.language == SHELL else [sys.executable, "-c", text]
        result = subprocess.run(
            command,
            cwd=self._where(),
            env=self._environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=SOON_S,
        )
        said = f"{block}: exit status {result.returncode}\n{result.stdout}\n{result.stderr}"
        if self._server is not None:
            said += f"\nthe server:\n{self._server.output}"
        assert result.returncode == 0, said
        if block.output is not None and (self._real or not block.of_weights):
            expected = block.output
            for old, new in self._replaced.items():
                expected = expected.replace(old, new)
            assert matches(expected, result.stdout), f"{said}\nThe page shows:\n{block.output}"

    def _where(self) -> Path:
        where = self._state.with_suffix(".cwd")
        return Path(where.read_text().strip()) if where.exists() else self._directory

    def _shell(self, text: str, *, last: bool = False) -> list[str]:
        """Variables and the directory pass from block to block, as in one terminal."""
        state, where = (shlex.quote(str(path)) for path in (self._state, self._state.with_suffix(".cwd")))
        before = (
            f'set -euo pipefail\n[ ! -e {state} ] || . {state}\n[ ! -e {where} ] || cd "$(cat {where})"\n'
        )
        after = "" if last else f"export -p > {state}\npwd > {where}\n"
        if last:
            head, command = text.rstrip("\n").rpartition("hotswap serve")[::2]
            text = f"{head}exec hotswap serve{command}"
        return ["bash", "-c", f"{before}{text}\n{after}"]

    def _stop(self) -> None:
        if self._server is not None:
            server, self._server = self._server, None
            server.stop()


class _Server:
    """A server that a block has started, from its being ready to SIGTERM and a clean end."""

    def __init__(
        self, command: list[str], directory: Path, environment: Mapping[str, str], block: Block
    ) -> None:
        self._block = block
        self._lines: list[str] = []
        self._ready = threading.Event()
        self._process = subprocess.Popen(
            command,
            cwd=directory,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        try:
            self._wait()
        except BaseException:
            self._end()
            raise

    def _wait(self) -> None:
        until = time.monotonic() + SOON_S
        while not self._ready.wait(0.05):
            assert self._process.poll() is None, f"{self._block}: the server ended\n{self.output}"
            assert time.monotonic() < until, f"{self._block}: the server is not ready\n{self.output}"

    @property
    def output(self) -> str:
        return "".join(self._lines)

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.append(line)
            if READY in line:
                self._ready.set()

    def stop(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            code = self._process.wait(SOON_S)
        finally:
            self._end()
        assert code == 0, f"{self._block}: the server ended with {code}\n{self.output}"

    def _end(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._reader.join()
        assert self._process.stdout is not None
        self._process.stdout.close()


def matches(expected: str, printed: str) -> bool:
    """Whether what was printed is what a page shows, but for `…` and the space around it."""
    pattern = ".*?".join(re.escape(part) for part in expected.strip().split("…"))
    return re.fullmatch(pattern, printed.strip(), re.DOTALL) is not None


def base_environment(**variables: str) -> dict[str, str]:
    """The environment of a reader who has set nothing of ours."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HOTSWAP_", "PYTEST_"))}
    return kept | {"COLUMNS": "120", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | variables
