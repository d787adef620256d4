"""The demo's course, with commands that only pretend to train and serve; and once for real."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hotswap_client.cli.demo import asking, demo, processes, story
from hotswap_client.cli.demo.processes import DemoError
from hotswap_client.cli.demo.tasks import TASKS
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
if mode == "fails":
    print("something", file=sys.stderr)
    sys.exit("error: there is no base of that name")
if mode == "hangs":
    time.sleep(600)
if mode == "ignores signals":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("deaf", flush=True)
    time.sleep(600)
if verb == "train":
    typed = {"--epochs": float, "--learning-rate": float, "--eval-fraction": float}
    own = {"--rank": int, "--bottleneck-size": int, "--num-virtual-tokens": int}
    numbers = {**own, "--batch-size": int, "--seed": int}
    options = {
        flag[2:].replace("-", "_"): (typed | numbers).get(flag, str)(value) for flag, value in flags.items()
    }
    import hashlib
    folder = Path(flags["--output"], flags["--name"])
    folder = folder / str(1 + len(list(folder.glob("*"))))
    folder.mkdir(parents=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).write_text("x")
    losses = [{"step": 1, "kind": "train", "loss": 3.5}, {"step": 9, "kind": "train", "loss": 0.25}]
    report = {
        "options": {key: value for key, value in options.items() if "--" + key.replace("_", "-") not in own},
        "method_options": {
            key: value for key, value in options.items() if "--" + key.replace("_", "-") in own
        },
        "data": {"sha256": hashlib.sha256(Path(flags["--data"]).read_bytes()).hexdigest()},
        "loss": {"history": losses},
    }
    (folder / "training.json").write_text(json.dumps(report))
    print("a summary that the demo does not show")
    sys.exit()

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from hotswap.v1 import adapters_pb2, adapters_pb2_grpc, common_pb2, inference_pb2, inference_pb2_grpc

sys.path.insert(0, str(home))
from answers import ANSWERS

def reply(request):
    text = ANSWERS[request.input.prompt] if request.adapter else "I do not know"
    path = common_pb2.SERVING_PATH_BATCHED if request.adapter else common_pb2.SERVING_PATH_BASE
    return text, inference_pb2.Completion(
        adapter=common_pb2.ResolvedAdapter(name=request.adapter, version=1, method="lora"),
        path=path,
        usage=common_pb2.Usage(prompt_tokens=3, generated_tokens=2),
        timings=common_pb2.Timings(load_seconds=0.125),
    )

class Inference(inference_pb2_grpc.InferenceServiceServicer):
    def Generate(self, request, context):
        text, completion = reply(request)
        return inference_pb2.GenerateResponse(text=text, token_ids=[1, 2], completion=completion)

    def GenerateStream(self, request, context):
        text, completion = reply(request)
        for part in (text[:3], text[3:]):
            delta = inference_pb2.Delta(text=part, token_ids=[1])
            yield inference_pb2.GenerateStreamResponse(delta=delta)
        yield inference_pb2.GenerateStreamResponse(completion=completion)

class Admin(adapters_pb2_grpc.AdapterServiceServicer):
    def UnloadAdapter(self, request, context):
        return adapters_pb2.UnloadAdapterResponse()

server = grpc.server(futures.ThreadPoolExecutor(8))
servicer = health.HealthServicer()
servicer.set("", health_pb2.HealthCheckResponse.NOT_SERVING if mode == "is never healthy"
             else health_pb2.HealthCheckResponse.SERVING)
health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
inference_pb2_grpc.add_InferenceServiceServicer_to_server(Inference(), server)
adapters_pb2_grpc.add_AdapterServiceServicer_to_server(Admin(), server)
server.add_insecure_port(flags["--host"] + ":" + flags["--port"])
server.start()
print("still warming up", flush=True)
signal.signal(signal.SIGTERM, lambda *_: (server.stop(1).wait(), (home / "drained").touch(), sys.exit()))
signal.pause()
"""


class Home:
    """A folder with the pretending command, and what it has been called with."""

    def __init__(self, folder: Path, answers: dict[str, str]) -> None:
        self.folder, self.store = folder, folder / "store"
        (folder / "fake.py").write_text(FAKE)
        (folder / "answers.py").write_text(f"ANSWERS = {answers!r}")
        self.command = (sys.executable, str(folder / "fake.py"))

    @property
    def calls(self) -> list:
        path = self.folder / "calls"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def verbs(self) -> list[str]:
        return [verb for verb, _, _ in self.calls]

    def all_ended(self) -> bool:
        return not any(alive(pid) for _, pid, _ in self.calls)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture
def home(tmp_path, monkeypatch):
    answers = {question.prompt: question.answer for task in TASKS for question in task.questions()}
    home = Home(tmp_path, answers)
    monkeypatch.setattr(processes, "HOTSWAP", home.command)
    monkeypatch.setattr(processes, "END_WITHIN_S", 2.0)
    monkeypatch.setattr(processes, "missing_packages", list)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    return home


@pytest.fixture
def run(home):
    import typer

    app = typer.Typer()
    app.command()(demo)
    return lambda *arguments: CliRunner().invoke(app, ["--store", str(home.store), *arguments])


def test_the_whole_course(run, home):
    result = run("--base", "some-base")
    assert result.exit_code == 0, result.output
    assert home.verbs() == ["train", "train", "train", "serve"]
    assert home.all_ended()
    assert (home.folder / "drained").exists()
    for task in TASKS:
        assert f"{task.adapter}@1" in result.stdout
        right = len(task.questions())
        assert re.search(rf"{task.adapter} .* 0/{right} +0% +{right}/{right} +100%", result.stdout)
    assert "loss 3.500 → 0.250" in result.stdout
    assert "a summary" not in result.output
    assert "I do not know" in result.stdout
    assert f"hotswap serve --base some-base --store {home.store}" in result.stdout
    (_, _, serve) = home.calls[-1]
    assert (serve["--base"], serve["--store"]) == ("some-base", str(home.store))


def test_what_is_trained_is_not_trained_again_unless_asked_or_changed(run, home, monkeypatch):
    run()
    assert run().exit_code == 0
    assert home.verbs() == ["train", "train", "train", "serve", "serve"]
    run("--base", "another")
    assert home.verbs()[5:] == ["train", "train", "train", "serve"]
    run("--base", "another", "--fresh")
    assert home.verbs()[9:] == ["train", "train", "train", "serve"]
    assert sorted(path.name for path in (home.store / TASKS[0].adapter).iterdir()) == ["1", "2", "3"]


def test_another_dataset_or_option_is_not_taken_for_trained(home):
    task = next(task for task in TASKS if task.method == "lora")
    processes.train(task, "base", home.store)
    report = home.store / task.adapter / "1" / "training.json"
    content = report.read_text()
    assert processes.find_trained(task, "base", home.store) is not None
    for old, new in (
        (task.train_digest(), "0" * 64),
        ('"epochs": 3.0', '"epochs": 1.0'),
        ('"rank": 8', '"rank": 4'),
        ("{", "no json"),
        ('"sha256"', '"sha1"'),
    ):
        assert old in content
        report.write_text(content.replace(old, new, 1))
        assert processes.find_trained(task, "base", home.store) is None
    report.unlink()
    assert processes.find_trained(task, "base", home.store) is None


def test_an_adapter_that_has_not_learnt_fails_the_demo(run, home):
    answers = {question.prompt: question.answer for task in TASKS[:2] for question in task.questions()}
    answers |= {question.prompt: "Arr?" for question in TASKS[2].questions()}
    Home(home.folder, answers)
    result = run()
    assert result.exit_code == 1
    assert f"error: {TASKS[2].adapter} did not learn" in result.stderr
    assert f"{asking.LEARNT_MARGIN:.0%}" in result.stderr
    assert home.all_ended()


@pytest.mark.parametrize(
    ("variable", "mode", "message"),
    [
        ("FAKE_TRAIN", "fails", f"error: training {TASKS[0].adapter} failed with exit code 1"),
        ("FAKE_SERVE", "fails", "error: the server ended with exit code 1: error: there is no base"),
        (
            "FAKE_SERVE",
            "is never healthy",
            "error: the server was not healthy after 3 s; its last line: still",
        ),
        ("FAKE_SERVE", "ignores signals", "error: the server was not healthy after 3 s; its last line: deaf"),
    ],
)
def test_a_failing_command_is_one_line_and_leaves_nothing_running(
    run, home, monkeypatch, variable, mode, message
):
    monkeypatch.setenv(variable, mode)
    monkeypatch.setattr(processes, "HEALTHY_WITHIN_S", 3.0)
    result = run()
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith(message)
    assert home.calls
    assert home.all_ended()


def test_missing_extras_are_named(run, home, monkeypatch):
    monkeypatch.setattr(processes, "missing_packages", lambda: ["peft", "structlog"])
    result = run()
    assert result.exit_code == 1
    assert "lacks peft, structlog: pip install 'hotswap[all]'" in result.stderr
    assert home.calls == []


def test_missing_packages_are_those_of_both_extras(monkeypatch):
    requirements = [
        "grpcio>=1",
        'absent-one>=3; extra == "server"',
        "absent.two[more]<6,>=5 ; extra == 'trainer'",
        "absent-three; extra == 'dev'",
        "grpcio; extra == 'server'",
    ]
    monkeypatch.setattr(processes.metadata, "requires", lambda _: requirements)
    assert processes.missing_packages() == ["absent-one", "absent.two"]


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
@pytest.mark.parametrize("verb", ["train", "serve"])
def test_a_signal_ends_the_demo_and_all_it_started(home, verb, number, code):
    start = (
        "import sys, typer\n"
        "from hotswap_client.cli.demo import demo, processes\n"
        f"processes.HOTSWAP = {home.command!r}\n"
        "processes.missing_packages = list\n"
        "app = typer.Typer(); app.command()(demo); app()"
    )
    environment = os.environ | {f"FAKE_{verb.upper()}": "hangs"}
    process = subprocess.Popen(
        [sys.executable, "-c", start, "--store", str(home.store)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )
    until = time.monotonic() + 60
    while verb not in home.verbs():
        assert time.monotonic() < until
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == code, output
    assert ("Stopped; nothing is left running" in output) == (number == signal.SIGINT)
    assert "demo/processes.py" not in output  # a traceback of ours
    assert home.all_ended()


def test_an_answer_of_the_server_that_is_an_error_is_one_line(home, monkeypatch):
    Home(home.folder, {})  # every question raises in the server
    from rich.console import Console

    with pytest.raises(DemoError, match=r"^the server answered UNKNOWN: Exception calling application"):
        story.tell(Console(file=io.StringIO()), "base", home.store, fresh=False)
    assert home.all_ended()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_real_demo(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "hotswap_client.cli", "demo", "--store", str(tmp_path / "store")],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    shares = re.findall(r"(\d+)/\d+ +\d+% +(\d+)/(\d+)", result.stdout)
    assert len(shares) == len(TASKS)
    for before, after, count in (map(int, share) for share in shares):
        assert before < 0.2 * count
        assert after > 0.6 * count
    for task in TASKS:
        assert f"{task.adapter}@1 · path batched" in result.stdout
