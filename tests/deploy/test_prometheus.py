"""A real Prometheus with our rules reads a real server under load, and answers what the dashboard asks."""

import asyncio
import json
import re
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
import yaml
from hotswap_client import AsyncClient
from hotswap_server import app
from hotswap_server.config import load_settings

FOLDER = Path(__file__).parents[2] / "deploy" / "monitoring"
DASHBOARD = json.loads((FOLDER / "grafana/dashboards/hotswap.json").read_text())
LOAD_S = 25
# What has nothing to show while all is well.
EMPTY = {"Failed and repeated loads"}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("prometheus") is None, reason="prometheus is not installed (Debian: prometheus)"
    ),
]


class Prometheus:
    """A process that scrapes `target` every second, with the deployed rules."""

    def __init__(self, directory: Path, port: int, target: str) -> None:
        config = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
        config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        config["rule_files"] = [str(FOLDER / "hotswap.rules.yml")]
        config["scrape_configs"][0]["static_configs"] = [{"targets": [target]}]
        file = directory / "prometheus.yml"
        file.write_text(yaml.safe_dump(config))
        self._url = f"http://127.0.0.1:{port}/api/v1/"
        self._log = (directory / "prometheus.log").open("wb")
        self._process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={file}",
                f"--storage.tsdb.path={directory / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=self._log,
            stderr=self._log,
        )

    def get(self, path: str, **query: str):
        url = f"{self._url}{path}?{urllib.parse.urlencode(query)}"
        with urllib.request.urlopen(url, timeout=10) as reply:
            answer = json.load(reply)
        assert answer["status"] == "success"
        return answer["data"]

    def wait(self) -> None:
        """Until it has read the target once."""
        until = time.monotonic() + 30
        while True:
            try:
                if self.get("query", query="hotswap_build_info")["result"]:
                    return
            except OSError:
                assert self._process.poll() is None, "prometheus has ended"
            assert time.monotonic() < until
            time.sleep(0.2)

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(30)
        self._log.close()


async def ask_for(seconds: float, address: str) -> int:
    async with AsyncClient(address) as client:
        until, answered = time.monotonic() + seconds, 0
        while time.monotonic() < until:
            asked = [
                client.generate(adapter=adapter, prompt="hello", max_new_tokens=20, ignore_eos=True)
                for adapter in (None, "acme/one", "acme/two")
            ]
            answered += len(await asyncio.gather(*asked))
    return answered


@pytest.mark.timeout(240)
async def test_prometheus_reads_a_server_under_load(tiny_base, write_lora, tmp_path, unused_tcp_port_factory):
    write_lora(tmp_path / "store/acme/one/1", seed=1)
    write_lora(tmp_path / "store/acme/two/1", seed=2)
    ports = unused_tcp_port_factory(), unused_tcp_port_factory()
    settings = load_settings(
        base=str(tiny_base),
        store=str(tmp_path / "store"),
        kv_cache_bytes="1MiB",
        threads=1,
        port=0,
        metrics_port=ports[0],
        calibrate=True,
        tenant_metrics=True,
    )
    ready: asyncio.Future[app.Ready] = asyncio.get_running_loop().create_future()
    stop = asyncio.Event()
    serving = asyncio.create_task(app.serve(settings, ready.set_result, stop=stop))
    address = (await ready).address
    prometheus = Prometheus(tmp_path, ports[1], f"127.0.0.1:{ports[0]}")
    try:
        await asyncio.to_thread(prometheus.wait)
        answered = await ask_for(LOAD_S, address)
        await asyncio.sleep(2)
        await asyncio.to_thread(check, prometheus, answered)
        stop.set()
        await serving
        await asyncio.sleep(3)
        [down] = prometheus.get("query", query='up{job="hotswap"}')["result"]
        assert down["value"][1] == "0"
        alerts = prometheus.get("alerts")["alerts"]
        assert [(a["labels"]["alertname"], a["state"]) for a in alerts] == [("HotswapDown", "pending")]
    finally:
        stop.set()
        prometheus.close()
        if not serving.done():
            await serving


def check(prometheus: Prometheus, answered: int) -> None:
    [up] = prometheus.get("query", query='up{job="hotswap"}')["result"]
    assert up["value"][1] == "1"
    [counted] = prometheus.get("query", query='sum(hotswap_requests_total{rpc="Generate"})')["result"]
    assert int(counted["value"][1]) == answered
    [scraped] = prometheus.get("query", query="max(scrape_duration_seconds)")["result"]
    [series] = prometheus.get("query", query='scrape_samples_scraped{job="hotswap"}')["result"]
    seconds = float(scraped["value"][1])
    print(f"{answered} requests, {series['value'][1]} series, a scrape takes {seconds:.3f} s")
    for group in prometheus.get("rules")["groups"]:
        for rule in group["rules"]:
            assert rule["health"] == "ok", rule
            assert rule.get("state", "inactive") == "inactive", rule
    for panel in DASHBOARD["panels"]:
        found = []
        for target in panel.get("targets", []):
            query = target["expr"].replace("$__rate_interval", "45s")
            query = re.sub(r"\$(instance|method)", ".*", query)
            found += prometheus.get("query", query=query)["result"]
        assert found or panel["type"] == "row" or panel["title"] in EMPTY, panel["title"]
        assert any(entry["value"][1] != "NaN" for entry in found) or not found, panel["title"]
