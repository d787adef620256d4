"""Everything that is asked of the servers, saved as it comes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from hotswap_client import AsyncClient
from hotswap_client.cli.compare import general
from hotswap_client.cli.compare.evaluate import Evaluation, Quiz, evaluate, longest_answer
from hotswap_client.cli.compare.latency import (
    BASE,
    Latency,
    Round,
    Subject,
    measure_round,
    round_as_json,
    round_of_json,
    summarise,
    warm_up,
)
from hotswap_client.cli.compare.options import CompareError, CompareOptions, Measuring
from hotswap_client.cli.compare.questions import Question
from hotswap_client.cli.compare.state import State, key_of
from hotswap_client.cli.compare.training import Trained

_MERGEABLE = ("lora", "qlora")
_MERGED = " merged"


@dataclass(frozen=True, slots=True)
class Servers:
    """Addresses: of the server that all share, and by method of those that are bases of their own."""

    shared: str
    own: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Measurements:
    """Evaluations by method, the base's as `base`, and all rounds of latency."""

    evaluations: Mapping[str, Evaluation]
    rounds: tuple[Round, ...]

    def latency(self, method: str) -> dict[int, Latency]:
        """By batch size."""
        return {size: summarise(self.rounds, method, size) for size in self.rounds[0][method]}

    def merged(self, method: str) -> dict[int, Latency] | None:
        """Likewise of the method merged into the base; None where that was not measured."""
        name = f"{method}{_MERGED}"
        return self.latency(name) if name in self.rounds[0] else None


@dataclass(frozen=True, slots=True)
class Saved:
    """What is measured so far: in `state`, under the key of the rounds and those of evaluations by method."""

    state: State
    rounds_key: str
    evaluation_keys: Mapping[str, str]

    def rounds(self) -> list[Any]:
        return list(self.state.get(self.rounds_key) or ())

    def evaluation(self, method: str) -> Evaluation | None:
        found = self.state.get(self.evaluation_keys[method])
        return None if found is None else Evaluation(**found)

    def whole(self, measuring: Measuring) -> Measurements | None:
        """None where something is missing still."""
        evaluations = {
            name: found for name in self.evaluation_keys if (found := self.evaluation(name)) is not None
        }
        rounds = self.rounds()
        if len(evaluations) < len(self.evaluation_keys) or len(rounds) < measuring.rounds:
            return None
        return Measurements(evaluations, tuple(map(round_of_json, rounds)))


def saved(
    state: State, options: CompareOptions, base_digest: str, test_digest: str, trained: Sequence[Trained]
) -> Saved:
    """What is saved of this comparison. An evaluation also serves comparisons with other methods."""
    measuring = options.measuring
    served = [base_digest, options.quantize, str(options.store.resolve())]
    asked = [test_digest, general.digest(), measuring.knowledge_step]
    versions = {BASE: "", **{entry.method: f"{entry.adapter}@{entry.version}" for entry in trained}}
    return Saved(
        state,
        key_of("rounds", served, asked, versions, options.seed, asdict(measuring)),
        {name: key_of("evaluation", served, asked, version) for name, version in versions.items()},
    )


async def measure(
    console: Console,
    servers: Servers,
    options: CompareOptions,
    questions: Sequence[Question],
    trained: Sequence[Trained],
    done: Saved,
) -> Measurements:
    """Evaluate and time the base and every method; what is `done` is not done again."""
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(AsyncClient(servers.shared))
        own = {
            method: await stack.enter_async_context(AsyncClient(target))
            for method, target in servers.own.items()
        }
        plain = [
            Subject(BASE, client),
            *(
                Subject(entry.method, own[entry.method])
                if entry.method in own
                else Subject(entry.method, client, f"{entry.adapter}@{entry.version}")
                for entry in trained
            ),
        ]
        await _evaluate_all(console, plain, options, questions, done)
        await _time_all(console, [*plain, *_to_merge(plain)], options, done)
    found = done.whole(options.measuring)
    if found is None:
        raise CompareError("measuring ended too early; please report it")
    return found


def _to_merge(subjects: Sequence[Subject]) -> list[Subject]:
    """Merged LoRAs cost the same, whatever they were trained over: the first stands for them."""
    for method in _MERGEABLE:
        for subject in subjects:
            if subject.name == method:
                return [Subject(f"{method}{_MERGED}", subject.client, subject.adapter, merged=True)]
    return []


async def _evaluate_all(
    console: Console,
    subjects: Sequence[Subject],
    options: CompareOptions,
    questions: Sequence[Question],
    done: Saved,
) -> None:
    left = [subject for subject in subjects if done.evaluation(subject.name) is None]
    if not left:
        return
    quiz = Quiz(
        questions=tuple(questions),
        paragraphs=tuple(general.paragraphs()),
        items=tuple(general.knowledge(options.measuring.knowledge_step)),
        max_new_tokens=await longest_answer(subjects[0].client, questions),
    )
    with _progress(console) as progress:
        bar = progress.add_task("asking", total=len(left) * quiz.num_requests)
        for subject in left:
            progress.update(bar, description=f"asking {subject.name}")
            found = await evaluate(subject.client, subject.adapter, quiz, lambda: progress.advance(bar))
            done.state.put(done.evaluation_keys[subject.name], asdict(found))
            progress.console.print(
                f"{subject.name}: {found.right} of {found.num_questions} right, "
                f"{found.knowledge_right} of {found.num_items} of general knowledge."
            )


async def _time_all(
    console: Console,
    subjects: Sequence[Subject],
    options: CompareOptions,
    done: Saved,
) -> None:
    measuring = options.measuring
    prompts = await _prompts(subjects[0].client, measuring)
    await warm_up(subjects, prompts)
    rounds = done.rounds()
    first = len(rounds)
    with _progress(console) as progress:
        bar = progress.add_task("latency", total=(measuring.rounds - first) * (len(subjects) + 1))
        for number in range(first, measuring.rounds):
            progress.update(bar, description=f"latency, round {number + 1} of {measuring.rounds}")
            seed = f"{options.seed}-{number}"
            measured = await measure_round(subjects, prompts, measuring, seed, lambda: progress.advance(bar))
            rounds.append(round_as_json(measured))
            done.state.put(done.rounds_key, rounds)
    console.print(f"Latency is measured in {measuring.rounds} rounds.")


async def _prompts(client: AsyncClient, measuring: Measuring) -> list[list[int]]:
    """As many different prompts as requests are sent at once, of the general text."""
    whole = await client.tokenize(prompt=" ".join(general.paragraphs()))
    length, count = measuring.prompt_tokens, max(measuring.batch_sizes)
    step = max(1, (len(whole.token_ids) - length) // count)
    return [list(whole.token_ids[index * step : index * step + length]) for index in range(count)]


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
