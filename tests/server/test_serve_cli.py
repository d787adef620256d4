"""`hotswap serve` as a process: its banner, its errors, and how signals end it."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import pytest
import typer
from hotswap.prompts import encode_prompt
from hotswap.v1 import common_pb2, inference_pb2, inference_pb2_grpc
from hotswap_server.cli import serve
from hotswap_server.config import ServeSettings, flag_of
from support.adapters import Oracle
from support.quantized import quantize
from transformers import AutoTokenizer
from typer.testing import CliRunner

LONG = 3000  # tokens; seconds, even of the tiny base


@dataclass
class Process:
    """A running `hotswap serve`; `output` and `errors` grow as it writes."""

    popen: subprocess.Popen[str]
    output: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    @property
    def address(self) -> str:
        return re.search(r"^address +(\S+)", "".join(self.output), re.M).group(1)

    def wait_ready(self) -> None:
        until = time.monotonic() + 90
        while not any("ready in" in line for line in self.output):
            assert self.popen.poll() is None, "".join(self.errors)
            assert time.monotonic() < until, "".join(self.output)
            time.sleep(0.05)

    def end(self, timeout: float = 60) -> int:
        return self.popen.wait(timeout)


@pytest.fixture
def store(tmp_path) -> Path:
    directory = tmp_path / "store"
    directory.mkdir()
    return directory


@pytest.fixture
def process(tiny_base, store):
    """`process(*flags)` starts a server over the tiny base, and kills it in the end."""

    @contextmanager
    def start(*flags: str) -> Iterator[Process]:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("HOTSWAP_")}
        environment |= {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "HF_HUB_OFFLINE": "1"}
        default = ["--base", tiny_base, "--store", store, "--port", "0", "--metrics-port", "0"]
        default += ["--threads", "1", "--kv-cache-bytes", "1MiB"]
        popen = subprocess.Popen(
            [sys.executable, "-m", "hotswap_server.cli", *map(str, default), *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        running = Process(popen)

        def follow(stream, lines):
            for line in stream:
                lines.append(line)
            stream.close()

        readers = [
            threading.Thread(target=follow, args=args)
            for args in ((popen.stdout, running.output), (popen.stderr, running.errors))
        ]
        for reader in readers:
            reader.start()
        try:
            running.wait_ready()
            yield running
        finally:
            with suppress(ProcessLookupError):
                popen.kill()
            popen.wait()
            for reader in readers:
                reader.join()

    return start


def stream(channel: grpc.Channel, tokens: int = LONG):
    return inference_pb2_grpc.InferenceServiceStub(channel).GenerateStream(
        inference_pb2.GenerateStreamRequest(
            input=common_pb2.Input(prompt="hello"),
            sampling=inference_pb2.SamplingParams(max_new_tokens=tokens, temperature=0.0, ignore_eos=True),
        ),
        timeout=60,
    )


def first_tokens(address: str) -> list[int]:
    with grpc.insecure_channel(address) as channel:
        return [token for message in stream(channel, 10) for token in message.delta.token_ids]


def test_sigterm_lets_a_running_stream_finish(process):
    with process("--log-format", "json") as running, grpc.insecure_channel(running.address) as channel:
        messages = stream(channel, 800)
        received = len(next(messages).delta.token_ids)
        running.popen.send_signal(signal.SIGTERM)
        for message in messages:
            received += len(message.delta.token_ids)
        assert received == 800
        assert running.end() == 0
    events = [line for line in running.errors if line.startswith("{")]
    assert len(events) == len(running.errors)
    assert any('"event": "draining"' in line for line in events)
    assert "Traceback" not in "".join(running.errors)


def test_a_second_signal_stops_at_once(process):
    with process() as running, grpc.insecure_channel(running.address) as channel:
        messages = stream(channel)
        next(messages)
        running.popen.send_signal(signal.SIGINT)
        while not any("draining" in line for line in running.errors):
            time.sleep(0.01)
        running.popen.send_signal(signal.SIGINT)
        with pytest.raises(grpc.RpcError) as caught:
            for _ in messages:
                pass
        assert caught.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
        assert running.end(10) == 0
    assert "Traceback" not in "".join(running.errors)


def test_a_killed_server_starts_again_on_the_same_store_and_port(process, store, write_lora, unused_tcp_port):
    write_lora(store / "acme/one/1")
    before = sorted(store.rglob("*"))
    with process("--port", str(unused_tcp_port)) as first, grpc.insecure_channel(first.address) as channel:
        expected = first_tokens(first.address)
        messages = stream(channel)
        next(messages)
        first.popen.kill()
        with pytest.raises(grpc.RpcError) as caught:
            for _ in messages:
                pass
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        first.end()
    assert sorted(store.rglob("*")) == before
    with process("--port", str(unused_tcp_port)) as second:
        assert first_tokens(second.address) == expected
        assert any(re.search(r"^store .*\(1 adapter\)", line) for line in second.output)


def test_a_server_that_others_reach_says_what_they_can_do(process, tmp_path):
    with process("--host", "0.0.0.0", "--log-level", "warning") as running:
        assert any("no TLS, every caller may do all" in line for line in running.output)
        warnings = [line for line in running.errors if "open_to_the_network" in line]
    assert len(warnings) == 2
    assert "--keys-file" in "".join(warnings)
    assert "--tls-cert" in "".join(warnings)


@pytest.fixture
def run(tiny_base, store, monkeypatch):
    """`run(*flags)` calls the command in this process; for what ends before serving."""
    monkeypatch.setattr("hotswap_server.logging.configure_logging", lambda *args: None)
    app = typer.Typer()
    app.command()(serve)

    def invoke(*flags: str):
        return CliRunner().invoke(app, list(map(str, flags)))

    return invoke


def assert_one_line(result, *parts: str) -> None:
    assert result.exit_code == 2
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    for part in ("hotswap serve: ", *parts):
        assert part in lines[0]


def test_user_errors_are_one_line(run, tiny_base, store, tmp_path):
    given = ("--base", tiny_base, "--store", store, "--port", 0, "--metrics-port", 0)
    assert_one_line(run("--base", tiny_base), "store", "--store")
    assert_one_line(run(*given, "--max-batch-size", "none"), "max_batch_size", "'none'")
    assert_one_line(run(*given, "--config", tmp_path / "none.yaml"), "none.yaml")
    assert_one_line(run(*given, "--base", tmp_path / "nothing"), "base", "nothing")
    assert_one_line(run(*given, "--store", tmp_path / "nothing"), "store")
    (tmp_path / "empty").mkdir()
    assert_one_line(run(*given, "--base", tmp_path / "empty"), "config.json")
    assert_one_line(run(*given, "--quantize", "int3"), "quantize", "'nf4', 'fp4' or 'int8'", "'int3'")


def test_a_base_of_another_quantisation_than_asked_for_is_one_line(run, tiny_base, store, tmp_path):
    quantize(tiny_base, "fp4").save_pretrained(tmp_path / "fp4")
    AutoTokenizer.from_pretrained(tiny_base).save_pretrained(tmp_path / "fp4")
    given = ("--base", tmp_path / "fp4", "--store", store, "--port", 0, "--metrics-port", 0)
    assert_one_line(run(*given, "--quantize", "nf4"), "--quantize: the base is stored in fp4 already")


def test_a_qlora_is_served_over_the_4_bits_that_it_was_trained_over(process, tiny_base, store, tmp_path):
    """The whole way by the command lines; PEFT over the same base says what is right."""
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": f"{n} and {n + 1}, "}) + "\n" for n in range(16)))
    options = {"method": "qlora", "base": tiny_base, "data": data, "name": "acme/count", "output": store}
    options |= {"rank": 4, "learning-rate": 5e-2, "max-steps": 8, "eval-fraction": 0, "device": "cpu"}
    options |= {"dtype": "float32", "work-dir": tmp_path / "work"}
    flags = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    trained = subprocess.run(
        [sys.executable, "-m", "hotswap_trainer", *flags], env=environment, capture_output=True, text=True
    )
    assert trained.returncode == 0, trained.stdout + trained.stderr
    answers = {}
    with process("--quantize", "nf4") as running, grpc.insecure_channel(running.address) as channel:
        for adapter in ("", "acme/count"):
            reply = inference_pb2_grpc.InferenceServiceStub(channel).Generate(
                inference_pb2.GenerateRequest(
                    input=common_pb2.Input(prompt="7 and "),
                    adapter=adapter,
                    sampling=inference_pb2.SamplingParams(
                        max_new_tokens=24, temperature=0.0, ignore_eos=True
                    ),
                ),
                timeout=60,
            )
            answers[adapter] = reply
    assert re.search(r"^weights +.*KiB, linear layers in nf4$", "".join(running.output), re.M)
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    oracle = Oracle(quantize(tiny_base, "nf4"), {"acme/count": store / "acme" / "count" / "1"})
    prompt = tuple(encode_prompt(tokenizer, "7 and "))
    for adapter, reply in answers.items():
        expected = oracle.generate(adapter or None, prompt, 24)
        assert list(reply.token_ids) == expected
        assert reply.text == tokenizer.decode(expected, skip_special_tokens=True)
    assert answers[""].text != answers["acme/count"].text


@pytest.mark.parametrize("flag", ["--port", "--metrics-port"])
def test_a_taken_port_is_named_before_the_base_is_loaded(run, store, flag):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        given = ("--base", "never-looked-at", "--store", store, "--port", 0, "--metrics-port", 0)
        assert_one_line(run(*given, flag, port), flag, str(port))


def test_an_unknown_flag_is_refused(run):
    result = run("--no-such-flag")
    assert result.exit_code == 2
    assert "--no-such-flag" in result.stderr
    assert "Traceback" not in result.stderr


def test_every_setting_has_a_flag_with_help(run):
    result = CliRunner().invoke(_command(), ["--help"], env={"COLUMNS": "200", "TERM": "dumb"})
    assert result.exit_code == 0
    for name in ServeSettings.model_fields:
        assert flag_of(name) in result.stdout


def test_the_command_is_found_without_heavy_imports():
    script = (
        "import sys, hotswap_server.cli\n"
        "print([m for m in ('torch', 'transformers', 'grpc', 'fsspec') if m in sys.modules])"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert (result.stdout.strip(), result.stderr) == ("[]", "")


def _command() -> typer.Typer:
    app = typer.Typer()
    app.command()(serve)
    return app
