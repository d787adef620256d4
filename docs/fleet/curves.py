"""The curves of docs/fleet.md: python docs/fleet/curves.py COSTS.json FOLDER

Writes adapters.svg, replicas.svg, rate.svg and curves.json with all that they show into FOLDER.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

from hotswap_server.fleet import Costs, Fleet, FleetReport, Target, Traffic, replicas_needed, simulate
from matplotlib import pyplot

pyplot.switch_backend("svg")
pyplot.rcParams |= {"svg.hashsalt": "hotswap", "font.size": 9}

# A replica as it could be run on one 80 GB GPU. Loads come from an object store 50 ms away.
FLEET = Fleet(
    adapter_slots=64, host_cache_bytes=64 << 30, max_batch_size=64, kv_tokens=300_000, store_latency=0.05
)
TRAFFIC = Traffic(
    rate=1.0, zipf=0.8, prompt_tokens=256, output_tokens=128, length_cv=0.5, seconds=40, warmup=10
)
RATE = 6.0  # requests per second and replica
ADAPTERS = (50, 100, 300, 1000, 3000, 10_000)
REPLICAS = (1, 2, 5, 10, 20, 50, 100)
RATES = (10, 30, 100, 200, 400)
AFFINITIES = ("ring", "round-robin")
COLOURS = {"ring": "tab:blue", "round-robin": "tab:orange"}


def main(costs_file: Path, folder: Path) -> None:
    costs = Costs.read(costs_file)
    began = time.perf_counter()
    by_adapters = {
        affinity: [
            run(
                costs,
                replace(FLEET, replicas=10, affinity=affinity),
                replace(TRAFFIC, rate=10 * RATE, adapters=n),
            )
            for n in ADAPTERS
        ]
        for affinity in AFFINITIES
    }
    by_replicas = {
        f"{affinity}, Zipf {zipf:g}": [
            run(
                costs,
                replace(FLEET, replicas=n, affinity=affinity),
                replace(TRAFFIC, rate=n * RATE, adapters=10_000, zipf=zipf),
            )
            for n in REPLICAS
        ]
        for affinity in AFFINITIES
        for zipf in (0.5, 0.8, 1.0)
    }
    needed = {
        affinity: [
            replicas_needed(
                costs,
                replace(FLEET, affinity=affinity),
                replace(TRAFFIC, rate=rate, adapters=10_000, zipf=0.5),
                Target(ttft_p95=1.0, itl_p95=0.05),
                max_replicas=100,
            ).replicas
            for rate in RATES
        ]
        for affinity in AFFINITIES
    }
    print(f"all curves took {time.perf_counter() - began:.0f} s")
    draw_adapters(by_adapters, folder / "adapters.svg")
    draw_replicas(by_replicas, folder / "replicas.svg")
    draw_rate(needed, folder / "rate.svg")
    figures = {
        "costs": costs_file.name,
        "by_adapters": {key: [asdict(r) for r in reports] for key, reports in by_adapters.items()},
        "by_replicas": {key: [asdict(r) for r in reports] for key, reports in by_replicas.items()},
        "replicas_needed": {"rates": RATES, **needed},
    }
    (folder / "curves.json").write_text(json.dumps(figures, indent=1) + "\n")


def run(costs: Costs, fleet: Fleet, traffic: Traffic) -> FleetReport:
    began = time.perf_counter()
    report = simulate(costs, fleet, traffic)
    print(
        f"{fleet.replicas} replicas, {fleet.affinity}, {traffic.adapters} adapters, Zipf {traffic.zipf:g}: "
        f"{report.requests} requests in {time.perf_counter() - began:.1f} s; "
        f"TTFT p95 {report.ttft.p95:.3f} s, "
        f"ITL p95 {report.itl.p95 * 1e3:.1f} ms, in a slot {report.device_hit_rate:.1%}, "
        f"else in host {report.host_hit_rate:.1%}, busiest {report.requests_of_busiest:.1f}, "
        f"refused {report.refused}",
        flush=True,
    )
    return report


def draw_adapters(reports: dict[str, list[FleetReport]], path: Path) -> None:
    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(10, 3.2), layout="constrained")
    for affinity, found in reports.items():
        colour = COLOURS[affinity]
        left.plot(
            ADAPTERS, [r.device_hit_rate for r in found], "o-", color=colour, label=f"{affinity}: in a slot"
        )
        either = [r.device_hit_rate + (1 - r.device_hit_rate) * r.host_hit_rate for r in found]
        left.plot(ADAPTERS, either, "s:", color=colour, label=f"{affinity}: or in host memory")
        middle.plot(ADAPTERS, [1e3 * r.ttft.p50 for r in found], "o:", color=colour, label=f"{affinity}, p50")
        middle.plot(ADAPTERS, [1e3 * r.ttft.p95 for r in found], "o-", color=colour, label=f"{affinity}, p95")
        right.plot(ADAPTERS, [1e3 * r.itl.p95 for r in found], "o-", color=colour, label=f"{affinity}, p95")
    for axes, title in ((left, "requests that find their adapter"), (middle, "TTFT, ms"), (right, "ITL, ms")):
        axes.set(xscale="log", xlabel="adapters", title=title)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    middle.set_yscale("log")
    left.set_ylim(0, 1.05)
    right.set_ylim(0)
    save(figure, path)


def draw_replicas(reports: dict[str, list[FleetReport]], path: Path) -> None:
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.4), layout="constrained")
    styles = {"0.5": ":", "0.8": "--", "1": "-"}
    for key, found in reports.items():
        affinity, _, zipf = key.partition(", Zipf ")
        style = {"color": COLOURS[affinity], "linestyle": styles[zipf], "marker": "o", "label": key}
        left.plot(REPLICAS, [1e3 * r.ttft.p95 for r in found], **style)
        right.plot(REPLICAS, [r.requests_of_busiest for r in found], **style)
    for axes, title in ((left, "TTFT p95, ms"), (right, "requests of the busiest replica over the mean")):
        axes.set(xscale="log", yscale="log", xlabel=f"replicas, {RATE:g} requests/s for each", title=title)
        axes.grid(alpha=0.3)
    right.legend(fontsize=7)
    save(figure, path)


def draw_rate(needed: dict[str, list[int | None]], path: Path) -> None:
    figure, axes = pyplot.subplots(figsize=(5, 3.2), layout="constrained")
    for affinity, found in needed.items():
        points = [(rate, n) for rate, n in zip(RATES, found, strict=True) if n is not None]
        line = "o-" if affinity == "ring" else "o:"  # the two may lie on one another
        axes.plot(*zip(*points, strict=True), line, color=COLOURS[affinity], label=affinity)
    axes.set(xlabel="requests/s", title="replicas for a TTFT p95 of 1 s and an ITL p95 of 50 ms")
    axes.grid(alpha=0.3)
    axes.legend()
    save(figure, path)


def save(figure: pyplot.Figure, path: Path) -> None:
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python docs/fleet/curves.py COSTS.json FOLDER")
    main(Path(sys.argv[1]), Path(sys.argv[2]))
