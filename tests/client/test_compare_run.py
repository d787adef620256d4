"""A comparison's course, with commands that only pretend to train and serve; and once for real."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer
from hotswap_client.cli.compare import compare, plots, story
from hotswap_client.cli.demo import processes
from typer.testing import CliRunner

from .conftest import ROOT

FAKE = """
import json, os, signal, sys, time
from concurrent import futures
from pathlib import Path

verb, flags = sys.argv[1], dict(zip(sys.argv[2::2], sys.argv[3::2]))
home = Path(__file__).parent
with (home / "calls").open("a") as calls:
    calls.write(json.dumps([verb, os.getpid(), flags]) + "\\n")
mode = os.environ.get("FAKE_" + verb.upper(), "")
if mode == "hangs" or mode == flags.get("--method"):
    time.sleep(600)
if mode == "fails":
    sys.exit("error: there is not enough memory")
if verb == "train":
    folder = Path(flags["--output"], flags["--name"])
    folder = folder / str(1 + len(list(folder.glob("*"))))
    folder.mkdir(parents=True)
    for name in ("config.json", "adapter_config.json", "adapter_model.safetensors"):
        (folder / name).write_text("x" * 1000)
    losses = [{"step": 1, "kind": "train", "loss": 3.5}, {"step": 9, "kind": "train", "loss": 0.25}]
    report = {
        "parameters": {"trainable": 1000, "total": 100000, "percent": 1.0},
        "steps": 9,
        "wall_seconds": 12.5,
        "peak_memory_bytes": {"host": 10**9},
        "loss": {"history": losses},
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
    }
    (folder / "training.json").write_text(json.dumps(report))
    sys.exit()

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from hotswap.v1 import adapters_pb2, adapters_pb2_grpc, common_pb2, inference_pb2, inference_pb2_grpc

sys.path.insert(0, str(home))
from answers import ANSWERS
merged = set()

def completion(request):
    path = (
        common_pb2.SERVING_PATH_BASE if not request.adapter
        else common_pb2.SERVING_PATH_MERGED if request.adapter in merged
        else common_pb2.SERVING_PATH_BATCHED
    )
    return inference_pb2.Completion(path=path, usage=common_pb2.Usage(generated_tokens=32))

def knows(request):
    return "prefix" not in request.adapter and (request.adapter or "full-" in flags["--base"])

class Inference(inference_pb2_grpc.InferenceServiceServicer):
    def Generate(self, request, context):
        text = ANSWERS[request.input.prompt] if knows(request) else "I do not know"
        return inference_pb2.GenerateResponse(text=text, completion=completion(request))

    def GenerateStream(self, request, context):
        for _ in range(5):
            time.sleep(0.001)
            yield inference_pb2.GenerateStreamResponse(delta=inference_pb2.Delta(text="x", token_ids=[7]))
        yield inference_pb2.GenerateStreamResponse(completion=completion(request))

    def Score(self, request, context):
        if mode == "refuses":
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the input is too long")
        entries = [common_pb2.TokenLogprob(token_id=1, logprob=-1.0)] * 4
        return inference_pb2.ScoreResponse(logprobs=entries, total_logprob=-4.0 - 0.1 * bool(request.adapter))

    def Tokenize(self, request, context):
        return inference_pb2.TokenizeResponse(token_ids=range(600), count=20)

class Admin(adapters_pb2_grpc.AdapterServiceServicer):
    def LoadAdapter(self, request, context):
        return adapters_pb2.LoadAdapterResponse()

    def MergeAdapter(self, request, context):
        merged.add(f"{request.name}@{request.version}" if request.version else request.name)
        return adapters_pb2.MergeAdapterResponse()

    def UnmergeAdapter(self, request, context):
        merged.clear()
        return adapters_pb2.UnmergeAdapterResponse()

server = grpc.server(futures.ThreadPoolExecutor(40))
servicer = health.HealthServicer()
servicer.set("", health_pb2.HealthCheckResponse.SERVING)
health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
inference_pb2_grpc.add_InferenceServiceServicer_to_server(Inference(), server)
adapters_pb2_grpc.add_AdapterServiceServicer_to_server(Admin(), server)
server.add_insecure_port(flags["--host"] + ":" + flags["--port"])
server.start()
signal.signal(signal.SIGTERM, lambda *_: (server.stop(1).wait(), sys.exit()))
signal.pause()
"""

ROWS = [{"prompt": f"What is {number}?", "completion": f" number {number}"} for number in range(20)]


class Home:
    """A folder with the pretending command, a base, data, and what the command has been called with."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.store, self.report = folder, folder / "store", folder / "report"
        (folder / "fake.py").write_text(FAKE)
        (folder / "answers.py").write_text(
            f"ANSWERS = { ({row['prompt']: row['completion'] for row in ROWS})!r}"
        )
        self.base = folder / "base"
        self.base.mkdir()
        (self.base / "config.json").write_text("{}")
        (self.base / "model.safetensors").write_text("w" * 5000)
        self.data = folder / "own.jsonl"
        self.data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        self.command = (sys.executable, str(folder / "fake.py"))

    @property
    def calls(self) -> list:
        path = self.folder / "calls"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def verbs(self) -> list[str]:
        return [flags.get("--method", verb) for verb, _, flags in self.calls]

    def arguments(self) -> list[str]:
        paths = {"base": self.base, "data": self.data, "store": self.store, "output": self.report}
        flags = [part for name, path in paths.items() for part in (f"--{name}", str(path))]
        return [*flags, "--methods", "lora,prefix,full", "--rounds", "2"]

    def json(self):
        return json.loads((self.report / "report.json").read_text())

    def all_ended(self) -> bool:
        return not any(Path(f"/proc/{pid}").exists() for _, pid, _ in self.calls)


@pytest.fixture
def home(tmp_path, monkeypatch):
    home = Home(tmp_path)
    monkeypatch.setattr(processes, "HOTSWAP", home.command)
    monkeypatch.setattr(processes, "missing_packages", list)
    monkeypatch.setattr(plots, "pictures", lambda _: ())  # seconds, which other tests spend on them
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    return home


@pytest.fixture
def run(home):
    app = typer.Typer()
    app.command()(compare)
    return lambda *arguments: CliRunner().invoke(app, [*home.arguments(), *arguments])


def untimed(content):
    """A report without what depends on time."""
    methods = [
        {key: value for key, value in row.items() if not key.startswith(("latency", "times"))}
        for row in content["methods"]
    ]
    return {
        **content,
        "methods": methods,
        "base": {**content["base"], "latency": None},
        "recommendation": None,
    }


def test_the_whole_course(run, home):
    result = run()
    assert result.exit_code == 0, result.output
    assert home.verbs() == ["lora", "prefix", "full", "serve", "serve"]
    assert home.all_ended()
    (_, _, lora), *_, (_, _, own) = home.calls
    assert (lora["--epochs"], lora["--batch-size"], lora["--eval-fraction"]) == ("1.5", "8", "0")
    assert "/compare/full-" in own["--base"]
    content = home.json()
    assert content["base"]["right"] == 0
    assert [row["right"] for row in content["methods"]] == [4, 0, 4]
    assert [row["method"] for row in content["methods"]] == ["lora", "prefix", "full"]
    assert content["methods"][0]["forgetting"]["text_logprob_change"] == -0.025
    assert content["methods"][2]["forgetting"]["text_logprob_change"] == 0
    assert content["methods"][0]["latency_merged"][1]["path"] == "merged"
    assert content["methods"][2]["latency"][0]["path"] == "base"
    assert content["recommendation"]["method"] in ("lora", "full")
    assert f"Recommended: {content['recommendation']['method']}" in result.stdout
    for name in story.REPORTS:
        assert (home.report / name).stat().st_size > 1000

    again = run()
    assert again.exit_code == 0, again.output
    assert len(home.calls) == 5  # neither trained nor measured again
    assert home.json() == content
    limited = run("--max-checkpoint", "500B")
    assert "has a checkpoint of 1 kB (--max-checkpoint 500 B)" in limited.stdout
    assert run("--remeasure").exit_code == 0
    assert home.verbs()[5:] == ["serve", "serve"]
    assert untimed(home.json()) == untimed(content)


def test_other_data_and_options_are_trained_and_the_rest_is_not(run, home):
    run("--methods", "lora")
    assert run("--methods", "lora,prefix").exit_code == 0
    assert home.verbs() == ["lora", "serve", "prefix", "serve"]
    assert run("--methods", "lora,prefix", "--set", "lora.rank=4").exit_code == 0
    assert home.verbs()[4:] == ["lora", "serve"]
    assert run("--methods", "lora", "--fresh").exit_code == 0
    assert home.verbs()[6:] == ["lora", "serve"]
    assert home.json()["methods"][0]["adapter"].endswith("@2")


@pytest.mark.parametrize(("variable", "value"), [("FAKE_TRAIN", "prefix"), ("FAKE_SERVE", "hangs")])
def test_an_interrupted_comparison_goes_on_where_it_was(run, home, variable, value):
    start = (
        "import typer\n"
        "from hotswap_client.cli.compare import compare\n"
        "from hotswap_client.cli.demo import processes\n"
        f"processes.HOTSWAP = {home.command!r}\n"
        "processes.missing_packages = list\n"
        "app = typer.Typer(); app.command()(compare); app()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", start, *home.arguments()],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {variable: value},
    )
    until = time.monotonic() + 60
    while ("prefix" if variable == "FAKE_TRAIN" else "serve") not in home.verbs():
        assert time.monotonic() < until
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 130, output
    assert "The same command goes on from here" in output
    assert home.all_ended()
    before = len(home.calls)
    assert run().exit_code == 0
    expected = ["prefix", "full", "serve", "serve"] if variable == "FAKE_TRAIN" else ["serve", "serve"]
    assert home.verbs()[before:] == expected


def test_what_was_measured_before_an_interruption_is_not_measured_again(run, home, monkeypatch):
    from hotswap_client.cli.compare import measuring

    asked, rounds, whole = [], [], measuring.measure_round
    evaluate = measuring.evaluate

    async def counted_evaluate(client, adapter, *rest):
        asked.append(adapter)
        return await evaluate(client, adapter, *rest)

    async def broken(subjects, prompts, settings, seed, done):
        rounds.append(seed)
        if len(rounds) == 2:
            raise KeyboardInterrupt
        return await whole(subjects, prompts, settings, seed, done)

    monkeypatch.setattr(measuring, "evaluate", counted_evaluate)
    monkeypatch.setattr(measuring, "measure_round", broken)
    assert run("--methods", "lora").exit_code == 130
    assert home.all_ended()
    assert len(asked) == 2  # the base and LoRA
    assert run("--methods", "lora").exit_code == 0
    assert len(asked) == 2
    assert rounds == ["0-0", "0-1", "0-1"]


@pytest.mark.parametrize(
    ("environment", "arguments", "code", "message"),
    [
        ({"FAKE_TRAIN": "fails"}, [], 1, "error: training with lora failed with exit code 1"),
        (
            {"FAKE_SERVE": "fails"},
            [],
            1,
            "error: the server ended with exit code 1: error: there is not enough",
        ),
        ({"FAKE_SERVE": "refuses"}, [], 1, "error: --data: the server refuses a question: .*too long"),
        ({}, ["--base", "nowhere"], 1, "error: --base: there is no directory nowhere"),
        ({}, ["--data", "nothing.jsonl"], 1, "error: --data: .*nothing.jsonl cannot be read"),
        ({}, ["--methods", "lora,dora"], 2, "error: --methods: there is no method 'dora'; did you mean lora"),
        ({}, ["--memory", "lots"], 2, "error: --memory: must be a size such as 50MB"),
        ({}, ["--max-latency-overhead", "15"], 2, "error: --max-latency-overhead: 15 is over 1; write 15%"),
    ],
)
def test_what_cannot_be_is_one_line(run, home, monkeypatch, environment, arguments, code, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    result = run(*arguments)
    assert result.exit_code == code, result.output
    *_, line = result.stderr.splitlines()
    assert re.match(message, line), line
    assert home.all_ended()


def test_missing_extras_are_named(run, home, monkeypatch):
    monkeypatch.setattr(processes, "missing_packages", lambda: ["peft"])
    result = run()
    assert result.exit_code == 1
    assert "lacks peft: pip install 'hotswap[all]'" in result.stderr
    assert home.calls == []


def test_the_default_store_is_in_the_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("HOTSWAP_CACHE_DIR", str(tmp_path))
    assert story.default_store() == tmp_path / "compare"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_real_comparison_of_all_methods_gives_the_same_table_twice(tiny_base, tmp_path):
    data = tmp_path / "own.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    reports = []
    for attempt, methods in (("first", "lora,qlora,bottleneck,prefix,ia3,full"), ("second", "lora,full")):
        where = {"store": tmp_path / attempt, "output": tmp_path / f"{attempt}-report"}
        options = {"base": tiny_base, "data": data, "max-steps": 4, "rounds": 1, **where}
        flags = ["--quick", "--methods", methods]
        flags += [part for name, value in options.items() for part in (f"--{name}", str(value))]
        result = subprocess.run(
            [sys.executable, "-m", "hotswap_client.cli", "compare", *flags],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=os.environ | {"HOTSWAP_CACHE_DIR": str(tmp_path / "cache")},
        )
        assert result.returncode == 0, result.stdout + result.stderr
        reports.append(json.loads((tmp_path / f"{attempt}-report" / "report.json").read_text()))
    first, second = reports
    again = {**first, "methods": [first["methods"][0], first["methods"][-1]]}  # those of the second
    assert untimed(again) == untimed(second)
    assert [row["training_steps"] for row in first["methods"]] == [4] * 6
    paths = [{entry["path"] for entry in row["latency"]} for row in first["methods"]]
    assert paths == [{"batched"}] * 5 + [{"base"}]
    assert first["methods"][0]["latency_merged"][0]["path"] == "merged"
    assert first["methods"][5]["trainable_percent"] == 100
    assert all(row["times"]["peak_memory_bytes"]["host"] > 10**8 for row in first["methods"])
