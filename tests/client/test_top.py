"""`hotswap top`: from the endpoint's text to what is shown."""

import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import typer
from hotswap_client.cli.top import verb as top_verb
from hotswap_client.cli.top.figures import figures, quantile
from hotswap_client.cli.top.scrape import ScrapeError, endpoint, parse, scrape
from hotswap_client.cli.top.view import view
from prometheus_client import generate_latest
from rich.console import Console
from support.metrics import exercised
from typer.testing import CliRunner

FIRST = generate_latest(exercised().registry).decode()


def later(text: str = FIRST) -> str:
    """Ten times as much of everything that is counted."""
    lines = []
    for line in text.splitlines():
        name, _, value = line.rpartition(" ")
        counts = any(f"{part}" in name for part in ("_total", "_bucket", "_sum", "_count"))
        lines.append(f"{name} {float(value) * 10}" if counts and not line.startswith("#") else line)
    return "\n".join(lines) + "\n"


@pytest.fixture
def served():
    """An endpoint that answers `text[0]`, with the status `text[1]`."""
    answer = [FIRST, 200]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(answer[1])
            self.end_headers()
            self.wfile.write(answer[0].encode())

        def log_message(self, *arguments): ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/metrics", answer
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def run():
    app = typer.Typer()
    app.command()(top_verb.top)
    return lambda *arguments: CliRunner().invoke(app, [*arguments])


def shown(text: str, width: int, before: str | None = None) -> str:
    console = Console(width=width, file=io.StringIO())
    seen = None if before is None else parse(before)
    console.print(view(figures(seen, parse(text)), width))
    return console.file.getvalue()


def test_figures_are_of_the_time_between_two_looks():
    before, now = parse(FIRST), parse(later())
    object.__setattr__(now, "at", before.at + 3.0)
    found = figures(before, now)
    assert found.seconds == 3.0
    assert found.generated_tokens_per_second == 9.0  # 3 tokens became 30
    assert found.codes == {"OK": 3.0}
    assert (found.running, found.waiting, found.kv_pages) == (1, 2, 4)
    assert found.batch_size == 4
    [lora] = found.methods
    assert (lora.method, lora.path, lora.overhead) == ("lora", "batched", 1.25)
    assert lora.tokens_per_second == 9.0
    assert 0.25 < lora.first_token.p50 <= 0.5
    assert 0.05 < lora.inter_token.p50 < lora.inter_token.p95 <= 0.5
    [adapters] = found.adapters
    assert (adapters.on_device, adapters.in_host, adapters.slots) == (1, 1, 16)


def test_a_server_that_began_anew_counts_from_nothing():
    found = figures(parse(later()), parse(FIRST))
    assert found.generated_tokens_per_second * found.seconds == pytest.approx(3)


def test_without_a_look_before_figures_are_since_the_start():
    found = figures(None, parse(FIRST))
    assert (found.seconds, found.generated_tokens_per_second) == (0.0, 3.0)


@pytest.mark.parametrize(
    ("buckets", "share", "expected"),
    [
        ([], 0.5, None),
        ([(1.0, 0.0), (float("inf"), 0.0)], 0.5, None),
        ([(1.0, 10.0), (float("inf"), 10.0)], 0.5, 0.5),
        ([(1.0, 5.0), (2.0, 10.0), (float("inf"), 10.0)], 0.95, 1.9),
        ([(1.0, 0.0), (2.0, 0.0), (float("inf"), 4.0)], 0.95, 2.0),
    ],
)
def test_quantiles_are_prometheus_s(buckets, share, expected):
    assert quantile(buckets, share) == (None if expected is None else pytest.approx(expected))


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_it_fits_the_terminal(width):
    text = shown(later(), width, FIRST)
    assert max(map(len, text.splitlines())) <= width
    for word in ("lora", "1.25x", "running", "1/16", "KV pages"):
        assert word in text
    assert ("end to end" in text) is (width >= 104)
    assert ("batched" in text) is (width >= 72)


def test_a_server_without_requests_is_shown():
    from hotswap_server.metrics import Metrics

    metrics = Metrics()
    metrics.describe_build(version="1", torch="2", device="cpu", base="smollm2")
    assert "no requests yet" in shown(generate_latest(metrics.registry).decode(), 80)


def test_once_as_text_and_as_json(served, run):
    url, _ = served
    result = run("--url", url, "--once")
    assert result.exit_code == 0
    assert "smollm2 on cpu" in result.stdout
    assert "since the start" in result.stdout
    printed = json.loads(run("--url", url, "--once", "--json").stdout)
    assert printed["methods"][0]["method"] == "lora"
    assert printed["adapters"][0]["on_device"] == 1


def test_it_goes_on_until_it_is_interrupted(served, run, monkeypatch):
    url, answer = served
    looks = []

    def sleep(seconds):
        looks.append(seconds)
        if len(looks) == 2:
            answer[1] = 500  # a look that fails is told, and does not end it
        if len(looks) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(top_verb.time, "sleep", sleep)
    result = run("--url", url, "--interval", "0.5")
    assert result.exit_code == 0
    assert looks == [0.5] * 4
    assert "answers 500" in " ".join(result.stdout.split())


def test_json_is_a_line_for_every_look(served, run, monkeypatch):
    url, _ = served
    looks = []

    def sleep(seconds):
        looks.append(seconds)
        if len(looks) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(top_verb.time, "sleep", sleep)
    result = run("--url", url, "--json")
    assert [json.loads(line)["running"] for line in result.stdout.splitlines()] == [1, 1]


def test_what_cannot_be_read_is_one_line(served, run, unused_tcp_port):
    url, answer = served
    for address, body, status, expected in (
        (f"127.0.0.1:{unused_tcp_port}", "", 200, "does a server run with this --metrics-port"),
        (url, "<html>no", 200, "no metrics of hotswap"),
        (url, "up 1\n", 200, "no metrics of hotswap"),
        (url, "gone", 404, "answers 404"),
        ("file:///etc/passwd", "", 200, "is no address"),
        ("http://", "", 200, "is no address"),
        ("a:99999", "", 200, "is no address"),
    ):
        answer[:] = [body, status]
        result = run("--url", address)
        assert result.exit_code == 1
        assert result.stdout == ""
        assert result.stderr.count("\n") == 1, result.stderr
        assert expected in result.stderr


def test_an_address_may_be_short(served):
    url, _ = served
    short = url.removeprefix("http://").removesuffix("/metrics")
    assert endpoint(short) == url
    assert endpoint("https://host/path") == "https://host/path"
    assert scrape(endpoint(short)).total("requests_total", code="OK") == 1
    with pytest.raises(ScrapeError):
        endpoint("http://host:0")
