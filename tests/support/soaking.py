"""A server under everything at once, and the answers that each adapter's content gives alone."""

from __future__ import annotations

import asyncio
import random
import re
import shutil
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import grpc
from hotswap.layout import publish
from hotswap.names import AdapterName
from hotswap_client import AsyncClient, HotswapError, ServingPath
from torch import nn

from support.adapters import write_bottleneck, write_ia3, write_lora, write_prefix
from support.models import random_prompt
from support.running import Running

Code = grpc.StatusCode
Writer = Callable[..., Path]
WRITERS: dict[str, Writer] = {
    "acme/lora4": partial(write_lora, r=4, target_modules="all-linear"),
    "acme/lora9": partial(write_lora, r=9, target_modules=["q_proj", "v_proj"]),
    "acme/prefix7": partial(write_prefix, tokens=7),
    "globex/dora": partial(write_lora, r=5, use_dora=True, target_modules=["v_proj", "o_proj", "up_proj"]),
    "globex/houlsby": partial(write_bottleneck, bottleneck_size=8),
    "globex/prefix33": partial(write_prefix, tokens=33),
    "globex/ia3": partial(
        write_ia3, target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
}
MERGEABLE = ("acme/lora4", "acme/lora9", "globex/dora")
BROKEN, ABSENT = "acme/broken", "acme/absent"
NEW_TOKENS = 32
SCORED = 12


@dataclass(frozen=True, slots=True)
class Question:
    prompt: tuple[int, ...]
    sampling: tuple[tuple[str, Any], ...]

    @property
    def options(self) -> dict[str, Any]:
        return {"ignore_eos": True, **dict(self.sampling)}


QUESTIONS = (
    Question(random_prompt(3, seed=0), (("temperature", 0.0),)),
    Question(random_prompt(70, seed=1), (("temperature", 0.0),)),
    Question(random_prompt(20, seed=2), (("temperature", 0.9), ("top_p", 0.9), ("seed", 7))),
)


@dataclass(frozen=True, slots=True)
class Answers:
    """By digest (None: the base), what each question is answered, and how the first one's answer scores."""

    contents: dict[str, list[Path]]
    digests: dict[str | None, set[str | None]]  # of all contents of a name
    tokens: dict[tuple[str | None, Question], tuple[int, ...]]
    scores: dict[str | None, float]


def answer_alone(model: nn.Module, base: Any, tokenizer: Any, place: Path, num_contents: int) -> Answers:
    """Write the contents, and ask each of them by itself in an engine of its own."""
    contents = {
        name: [
            write(model, place / f"{name}-{seed}" / "1", seed=seed * 10 + index)
            for seed in range(num_contents)
        ]
        for index, (name, write) in enumerate(WRITERS.items())
    }
    tokens, scores, digests = {}, {}, defaultdict[str | None, set[str | None]](set)
    with Running(base, tokenizer, place) as running:
        names = [None, *(f"{name}-{seed}" for name in WRITERS for seed in range(num_contents))]
        for name in names:
            ref = running.ref(name)
            digest = None if ref is None else ref.digest
            digests[None if name is None else name.rpartition("-")[0]].add(digest)
            for question in QUESTIONS:
                outcome = running.generate(
                    question.prompt, ref, max_new_tokens=NEW_TOKENS, **question.options
                )
                tokens[digest, question] = tuple(outcome.result().tokens)
            scored = QUESTIONS[0].prompt + tokens[None, QUESTIONS[0]][:SCORED]
            scores[digest] = sum(entry.logprob for entry in running.score(scored, name).scored.logprobs)
    assert len(set(tokens.values())) > 0.95 * len(tokens), "a mix-up must show"
    return Answers(contents, dict(digests), tokens, scores)


def documented_errors(page: Path) -> set[tuple[Code, str]]:
    """Code and reason of every error in the operator's table, but for the server's own faults."""
    rows = re.findall(r"^\| ([A-Z_]+) \| (`[A-Z_`, ]+`) \|", page.read_text(), re.MULTILINE)
    assert rows, f"{page} has no table of errors"
    return {
        (Code[code], reason)
        for code, reasons in rows
        for reason in re.findall(r"[A-Z_]+", reasons)
        if code not in ("INTERNAL", "UNKNOWN")
    }


@dataclass
class Soak:
    """Callers, an operator and a publisher, each doing one random thing after another.

    `wrong` and `undocumented` are what must stay empty.
    """

    client: AsyncClient
    answers: Answers
    store: Path
    documented: set[tuple[Code, str]]
    rng: random.Random
    counts: Counter[str] = field(default_factory=Counter)
    paths: Counter[ServingPath] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    undocumented: list[str] = field(default_factory=list)
    _versions: defaultdict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    _next: Counter[str] = field(default_factory=Counter)

    def publish(self, name: str, keep: int = 5) -> None:
        """The next of its contents as a new version; the oldest versions are deleted."""
        contents = self.answers.contents[name]
        source = contents[self._next[name] % len(contents)]
        self._next[name] += 1
        version = publish(
            self.store, AdapterName.parse(name), lambda to: shutil.copytree(source, to, dirs_exist_ok=True)
        )
        versions = self._versions[name]
        versions.append(version)
        while len(versions) > keep:
            old = self.store / name / str(versions.pop(0))
            shutil.rmtree(old.rename(old.with_name(f".old-{old.name}")))

    async def run(self, seconds: float, *, callers: int = 24) -> None:
        until = asyncio.get_running_loop().time() + seconds
        asks = (self.generate, self.stream, self.leave, self.hurry, self.score, self.err)
        rules = (self.load, self.unload, self.pin, self.unpin, self.merge, self.unmerge, self.look)

        async def act(choices: Iterable[Any], weights: Iterable[int], pause: float) -> None:
            chosen = random.Random(self.rng.random())
            while asyncio.get_running_loop().time() < until:
                [choice] = chosen.choices(tuple(choices), tuple(weights))
                await choice(chosen)
                self.counts[choice.__name__] += 1
                await asyncio.sleep(pause * chosen.random())

        async def publisher(chosen: random.Random) -> None:
            await asyncio.to_thread(self.publish, chosen.choice(list(WRITERS)))

        async with asyncio.TaskGroup() as group:
            for _ in range(callers):
                group.create_task(act(asks, (4, 4, 2, 2, 2, 1), 0.02))
            for _ in range(2):
                group.create_task(act(rules, (3, 3, 2, 3, 3, 2, 1), 0.3))
            group.create_task(act([publisher], [1], 2.0))

    # What callers do.

    async def generate(self, chosen: random.Random) -> None:
        question, count, options = self._request(chosen)
        async with self._judged("generate", options):
            result = await self.client.generate(**options)
            self.paths[result.path] += 1
            self._check(question, result.digest, result.token_ids, count, result.version, options)

    async def stream(self, chosen: random.Random) -> None:
        question, count, options = self._request(chosen)
        async with self._judged("stream", options):
            received: list[int] = []
            async with self.client.stream(**options) as stream:
                async for delta in stream:
                    received += delta.token_ids
            result = stream.result
            assert result is not None
            self.paths[result.path] += 1
            self._check(question, result.digest, tuple(received), count, result.version, options)

    async def leave(self, chosen: random.Random) -> None:
        """Cancel a stream early, or before its first token. What came must begin the right answer."""
        question, _, options = self._request(chosen)
        wanted = chosen.randrange(6)
        async with self._judged("leave", options):
            received: list[int] = []
            async with self.client.stream(**options) as stream:
                if not wanted:
                    await asyncio.sleep(chosen.random() * 0.01)
                while len(received) < wanted and (delta := await anext(stream, None)) is not None:
                    received += delta.token_ids
            digests = self.answers.digests[options.get("adapter")]
            if tuple(received) not in {
                self.answers.tokens[digest, question][: len(received)] for digest in digests
            }:
                self.wrong.append(f"{options.get('adapter')} began with {received}")

    async def hurry(self, chosen: random.Random) -> None:
        question, count, options = self._request(chosen)
        deadline = chosen.choice((0.003, 0.03, 0.3, 1.0))
        async with self._judged("hurry", options, Code.DEADLINE_EXCEEDED):
            result = await self.client.generate(**options, timeout=deadline)
            self._check(question, result.digest, result.token_ids, count, result.version, options)

    async def score(self, chosen: random.Random) -> None:
        name = chosen.choice((None, *WRITERS))
        question = QUESTIONS[0]
        # All contents of a name are asked about the answer of the base, so that a mix-up shows in the sum.
        text = question.prompt + self.answers.tokens[None, question][:SCORED]
        async with self._judged("score", {"adapter": name}):
            result = await self.client.score(adapter=name, token_ids=text)
            expected = self.answers.scores[result.digest]
            if abs(result.total_logprob - expected) > 1e-3 * len(text):
                self.wrong.append(f"score of {name}@{result.version}: {result.total_logprob}, not {expected}")

    async def err(self, chosen: random.Random) -> None:
        """A request that cannot be served; it must be told exactly why."""
        options, code, reason = chosen.choice(
            (
                ({"adapter": ABSENT}, Code.NOT_FOUND, "ADAPTER_NOT_FOUND"),
                ({"adapter": "acme/lora4", "version": 10**6}, Code.NOT_FOUND, "ADAPTER_NOT_FOUND"),
                ({"adapter": BROKEN}, Code.FAILED_PRECONDITION, "ADAPTER_INVALID"),
                ({"token_ids": (5,) * 2000}, Code.INVALID_ARGUMENT, "INVALID_REQUEST"),
                ({"token_ids": (10**6,)}, Code.INVALID_ARGUMENT, "INVALID_REQUEST"),
                ({"temperature": -1.0}, Code.INVALID_ARGUMENT, "INVALID_REQUEST"),
                ({"adapter": "acme/../x"}, Code.INVALID_ARGUMENT, "INVALID_REQUEST"),
                ({"max_new_tokens": 0}, Code.INVALID_ARGUMENT, "INVALID_REQUEST"),
            )
        )
        try:
            await self.client.generate(**({"token_ids": (5, 6), "max_new_tokens": 2} | options))
        except HotswapError as error:
            if (error.code, error.reason) != (code, reason):
                self.undocumented.append(f"{options} gave {error.code.name} {error.reason}: {error}")
        else:
            self.wrong.append(f"{options} was answered")

    # What operators do. They get into each other's way, which they are told.

    async def load(self, chosen: random.Random) -> None:
        name, to = chosen.choice(list(WRITERS)), chosen.choice(("device", "host"))
        async with self._judged("load", {}, Code.CANCELLED, Code.FAILED_PRECONDITION):
            await self.client.adapters.load(name, to=to)

    async def unload(self, chosen: random.Random) -> None:
        name, in_use = chosen.choice(list(WRITERS)), chosen.choice(("refuse", "wait", "cancel"))
        async with self._judged("unload", {}, Code.FAILED_PRECONDITION):
            await self.client.adapters.unload(name, in_use=in_use)

    async def pin(self, chosen: random.Random) -> None:
        codes = (Code.FAILED_PRECONDITION, Code.RESOURCE_EXHAUSTED, Code.CANCELLED)
        async with self._judged("pin", {}, *codes):
            await self.client.adapters.pin(chosen.choice(list(WRITERS)))

    async def unpin(self, chosen: random.Random) -> None:
        async with self._judged("unpin", {}):
            await self.client.adapters.unpin(chosen.choice(list(WRITERS)))

    async def merge(self, chosen: random.Random) -> None:
        codes = (Code.FAILED_PRECONDITION, Code.RESOURCE_EXHAUSTED, Code.CANCELLED)
        async with self._judged("merge", {}, *codes):
            await self.client.adapters.merge(chosen.choice(MERGEABLE))
            self.counts["merged"] += 1

    async def unmerge(self, chosen: random.Random) -> None:
        async with self._judged("unmerge", {}, Code.FAILED_PRECONDITION):
            await self.client.adapters.unmerge(chosen.choice(MERGEABLE))
            self.counts["unmerged"] += 1

    async def look(self, chosen: random.Random) -> None:
        async with self._judged("look", {}):
            await self.client.adapters.list(all_versions=chosen.random() < 0.5)

    async def empty(self) -> None:
        """Unmerge, unpin and unload everything."""
        for name in WRITERS:
            await self.client.adapters.unpin(name)
            if any(adapter.merged for adapter in await self.client.adapters.list(all_versions=True)):
                for merged in MERGEABLE:
                    async with self._judged("unmerge", {}, Code.FAILED_PRECONDITION):
                        await self.client.adapters.unmerge(merged)
        for name in WRITERS:
            await self.client.adapters.unload(name, in_use="wait")

    def _request(self, chosen: random.Random) -> tuple[Question, int, dict[str, Any]]:
        question, count = chosen.choice(QUESTIONS), chosen.randrange(1, NEW_TOKENS + 1)
        options = {"token_ids": question.prompt, "max_new_tokens": count, **question.options}
        if (name := chosen.choice((None, *WRITERS))) is not None:
            options["adapter"] = name
            if chosen.random() < 0.2:
                options["version"] = chosen.choice(self._versions[name])
        return question, count, options

    def _check(
        self,
        question: Question,
        digest: str | None,
        got: tuple[int, ...],
        count: int,
        version: int | None,
        options: dict[str, Any],
    ) -> None:
        expected = self.answers.tokens[digest, question][:count]
        if got != expected or options.get("version", version) != version:
            who = f"{options.get('adapter')}@{version} on {len(question.prompt)} tokens"
            self.wrong.append(f"{who}: {got}, not {expected}")

    @asynccontextmanager
    async def _judged(self, what: str, options: dict[str, Any], *codes: Code) -> AsyncIterator[None]:
        """Errors that the documentation has, of `codes` or of what may happen to any request."""
        allowed = set(codes)
        if options.get("adapter") is not None:
            allowed.add(Code.CANCELLED)  # unloaded by an operator who does not wait
        if "version" in options:
            allowed.add(Code.NOT_FOUND)  # deleted meanwhile
        try:
            yield
        except HotswapError as error:
            self.counts[f"{what} {error.code.name} {error.reason}"] += 1
            known = (error.code, error.reason) in self.documented or (
                # By the client's own clock; there is no answer with a reason then.
                error.code is Code.DEADLINE_EXCEEDED and not error.reason
            )
            if error.code not in allowed or not known:
                self.undocumented.append(f"{what}: {error.code.name} {error.reason}: {error}")
