"""The command: lazy verbs, options, output and exit codes."""

import json
import os
import resource
import subprocess
import sys

import grpc
import pytest
from google.rpc import error_details_pb2
from typer.testing import CliRunner

from .conftest import ROOT, fail

SOURCES = [str(ROOT / name) for name in ("proto", "server", "trainer", "client")]


@pytest.fixture
def hotswap(fake, verbs, monkeypatch):
    """Run the command in this process, against the scripted server."""
    monkeypatch.syspath_prepend(str(verbs))
    monkeypatch.setenv("HOTSWAP_TARGET", fake.target)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    from hotswap_client.cli._app import app

    return lambda *arguments, **options: CliRunner().invoke(app, arguments, **options)


def spawn(verbs, code, *arguments, path=(), **options):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*map(str, path), str(verbs), *SOURCES])}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True, **options
    )


MAIN = "from hotswap_client.cli import main; main()"


def test_generate_streams_and_ends_the_line(hotswap, fake):
    result = hotswap(
        "generate", "hello", "--adapter", "acme/support", "--temperature", "0", "--stop", "a", "--stop", "b"
    )
    assert (result.exit_code, result.stdout) == (0, "hi!\n")
    (request,) = fake.requests
    assert type(request).__name__ == "GenerateStreamRequest"
    assert (request.adapter, request.input.prompt, request.sampling.temperature) == (
        "acme/support",
        "hello",
        0,
    )
    assert list(request.sampling.stop) == ["a", "b"]
    assert not request.sampling.HasField("top_p")


def test_generate_reads_standard_input_and_prints_json(hotswap, fake):
    result = hotswap("generate", "--json", "--api-key", "k", input="from stdin")
    shown = json.loads(result.stdout)
    assert (shown["text"], shown["finish_reason"], shown["timings"]["decode"]) == ("hi!", "stop_token", 4)
    assert fake.requests[0].input.prompt == "from stdin"
    assert fake.metadata[0]["authorization"] == "Bearer k"


def test_generate_takes_a_conversation(hotswap, fake):
    turns = json.dumps([{"role": "user", "content": "hi"}])
    assert hotswap("generate", "--messages", turns, "--no-stream").stdout == "hi!\n"
    assert fake.requests[0].input.messages.messages[0].role == "user"
    for wrong in (["--messages", "{"], ["--messages", "{}"], ["x", "--messages", turns]):
        result = hotswap("generate", *wrong)
        assert result.exit_code == 2
        assert "--messages" in result.stderr


def test_the_key_comes_from_the_environment(hotswap, fake, monkeypatch):
    monkeypatch.setenv("HOTSWAP_API_KEY", "s3cret")
    hotswap("adapters", "show", "acme/support")
    assert fake.metadata[0]["authorization"] == "Bearer s3cret"
    assert "s3cret" not in hotswap("adapters", "show", "--help").stdout


def test_a_server_that_is_not_there_gets_a_hint(hotswap):
    result = hotswap("adapters", "list", "--target", "localhost:1")
    assert result.exit_code == 1
    assert "Is `hotswap serve` running there?" in result.stderr


def test_adapters_list(hotswap):
    result = hotswap("adapters", "list")
    assert result.exit_code == 0
    assert "acme/support" in result.stdout
    assert "3.0 MiB" in result.stdout
    assert "device, pinned" in result.stdout
    assert "store, broken" in result.stdout
    assert "acme/old@1: is damaged" in result.stderr
    assert [entry["name"] for entry in json.loads(hotswap("adapters", "list", "--json").stdout)] == [
        "acme/old",
        "acme/support",
    ]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["load", "acme/support"], "acme/support@3 is on the device (0.250 s)"),
        (["load", "acme/support", "--host"], "acme/support@3 is on the device (0.250 s)"),
        (["unload", "acme/support", "--in-use", "cancel"], "2 requests were cancelled"),
        (["pin", "acme/support"], "acme/support@3 is pinned"),
        (["unpin", "acme/support"], "acme/support@3 is no longer pinned"),
        (["merge", "acme/support"], "acme/support@3 is merged (0.500 s)"),
        (["unmerge", "acme/support"], "acme/support@3 is no longer merged (0.750 s)"),
        (["calibrate"], "4 made up"),
        (["calibrate"], "1.25"),
        (["calibrate", "--json"], '"overhead_ratio": 1.25'),
        (["show", "acme/support", "--version", "3"], '"num_parameters": 1000'),
    ],
)
def test_adapters_verbs(hotswap, arguments, expected):
    result = hotswap("adapters", *arguments)
    assert result.exit_code == 0, result.stderr
    assert expected in result.stdout


def test_an_error_is_one_line(hotswap, fake):
    info = error_details_pb2.ErrorInfo(reason="ADAPTER_NOT_FOUND", domain="hotswap")
    fake.scripts["GetAdapter"] = fail(grpc.StatusCode.NOT_FOUND, "no adapter\nacme/x", info)
    result = hotswap("adapters", "show", "acme/x")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "error: NOT_FOUND: no adapter acme/x\n"


def test_ctrl_c_exits_130(hotswap, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("hotswap_client.Client.generate", interrupt)
    result = hotswap("generate", "x", "--json")
    assert (result.exit_code, result.output) == (130, "")


@pytest.mark.parametrize(
    "arguments", [["generate", "--nonsense"], ["nonsense"], ["generate", "x", "--in-use"]]
)
def test_a_wrong_flag_or_verb_exits_2(hotswap, arguments):
    result = hotswap(*arguments)
    assert result.exit_code == 2
    assert arguments[-1] in result.stderr


def test_a_value_of_the_wrong_type_names_its_flag(hotswap):
    result = hotswap("generate", "x", "--temperature", "warm")
    assert result.exit_code == 2
    assert "--temperature" in result.stderr


def test_version(hotswap):
    assert hotswap("--version").stdout.startswith("hotswap 0.")


def processor_seconds() -> float:
    """What ended child processes have used."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def test_help_lists_every_verb_quickly_and_imports_nothing_heavy(verbs):
    code = f"""
import atexit, sys
heavy = {{"torch", "transformers", "hotswap_server", "hotswap_trainer", "pydantic"}}
atexit.register(lambda: print("LOADED", sorted(heavy & set(sys.modules))))
{MAIN}
"""
    times = []
    for _ in range(3):  # the processor's time, and the best of three: other work may share the machine
        start = processor_seconds()
        result = spawn(verbs, code, "--help")
        times.append(processor_seconds() - start)
    assert result.returncode == 0
    for verb in ("generate", "adapters", "serve", "train", "bench", "demo", "top"):
        assert f" {verb} " in result.stdout
    assert "Generate text with the base model" in result.stdout
    assert "LOADED []" in result.stdout
    assert min(times) < 1.5  # half a second on a quiet machine


def test_a_verb_without_its_extra_says_which(verbs, tmp_path):
    package = tmp_path / "fake" / "hotswap_trainer"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "cli.py").write_text('def train() -> None:\n    """Train."""\n    import absent_library\n')
    result = spawn(verbs, MAIN, "train", path=[package.parent])
    assert (result.returncode, result.stdout) == (2, "")
    missing, remedy = "absent_library, which is not installed", "pip install 'hotswap[trainer]'"
    assert result.stderr == f"error: `hotswap train` needs {missing}: {remedy}\n"


def test_without_typer_the_command_says_what_to_install(verbs):
    result = spawn(verbs, f"import sys; sys.modules['typer'] = None; {MAIN}", "--help")
    assert result.returncode == 2
    assert "pip install 'hotswap[cli]'" in result.stderr


def test_a_flag_can_make_a_verb_another_command(hotswap):
    result = hotswap("plan", "--fleet", "--help")
    assert result.exit_code == 0, result.output
    assert "plan --fleet [OPTIONS]" in result.output
    assert "--costs" in result.output
    refused = hotswap("plan", "--rate", "3", "--fleet")
    assert refused.exit_code == 2
    assert refused.stderr.startswith("hotswap plan --fleet: costs: is required")


def test_such_a_command_names_the_extra_that_it_lacks(verbs):
    code = "import sys; sys.modules['numpy'] = None; " + MAIN
    result = spawn(verbs, code, "plan", "--fleet", "--costs", "x", "--rate", "1")
    assert result.returncode == 2
    assert "`hotswap plan --fleet` needs numpy" in result.stderr
    assert "pip install 'hotswap[server]'" in result.stderr
