"""What the relay costs: CPU per delivered event beside a bare server, latency, memory, gaps.

    python3 run.py bench relay [--streams 100 500 2000] [--rate 20] [--seconds 5] [--save]

Everything is real but the model: Redis, a gateway process, a worker that appends timestamps to all
sessions through the production scripts, and HTTP clients in processes of their own that check every
id. The bare server (`_relay_bare.py`) sends the same frames in the same bursts. Linux only.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import platform
import tempfile
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import _relay_parts as parts
from benchmarks._relay_measure import (
    SLOW_READERS,
    Load,
    Measured,
    measure_bare,
    measure_gateways,
    measure_proxied,
    measure_slow_readers,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

FEW = 100
"""Streams at which latency is judged, and beside which slow readers are set."""

MIDDLE = 500
"""Streams at which the cost is judged, and that are divided between two gateways."""

TARGETS = "Aims: ratio ≤ 1.0 at 500; p50 ≤ 3 ms and p99 ≤ 10 ms at 100; ≤ 30 KB; gaps 0."
SATURATED = (
    "Near 100 % busy, events wait for the processor: latencies then show the machine's load, and "
    "several events share a write, which makes each of them cheaper."
)

Row = tuple[Load, Measured, Measured]
"""A load, what the gateway did with it, and what the bare server did."""


def table(rows: list[Row]) -> Iterator[str]:
    """Yield the lines of a table of gateway and bare server."""
    yield (
        "| streams x rate | events/s | gateway µs/event | bare µs/event | ratio "
        "| gateway p50 / p99 ms | bare p50 / p99 ms | machine busy | KB per idle stream "
        "| longest GC pause ms | gaps |"
    )
    yield "|" + "---|" * 11
    for load, ours, bare in rows:
        yield (
            f"| {load.streams} x {load.rate:g} | {ours.events / ours.seconds:.0f} "
            f"| {ours.micros:.1f} | {bare.micros:.1f} | {ours.micros / bare.micros:.2f} "
            f"| {ours.quantile(0.5):.1f} / {ours.quantile(0.99):.1f} "
            f"| {bare.quantile(0.5):.1f} / {bare.quantile(0.99):.1f} "
            f"| {ours.busy:.0%} / {bare.busy:.0%} | {ours.idle_kb:.1f} | {ours.gc_ms:.1f} "
            f"| {ours.gaps + bare.gaps} |"
        )


def growth(rows: list[Row]) -> str:
    """Say how the cost per event grows from the fewest to the most streams."""
    (few, first, bare_first), (many, last, bare_last) = rows[0], rows[-1]
    ours, bare = last.micros / first.micros, bare_last.micros / bare_first.micros
    return (
        f"From {few.streams} to {many.streams} streams the cost per event changes by x{ours:.2f}, "
        f"the bare server's by x{bare:.2f}: the gateway's growth is {ours / bare:.2f} of the bare "
        "server's (aim: within 0.80 to 1.20, or less)."
    )


def pairs(folder: Path, loads: list[Load]) -> list[Row]:
    """Measure both servers under each load, one after the other."""
    return [(load, measure_gateways(folder, load), measure_bare(load)) for load in loads]


def bursts(folder: Path, args: argparse.Namespace) -> Iterator[str]:
    """Yield what latency the same events have when fewer sessions share a worker's step.

    Each size is measured twice, the second time where no processor sleeps, which idle virtual ones
    do: an event passes four processes (worker, Redis, gateway, client), the bare server's two.
    """
    yield f"Latency at {FEW} x {args.rate:g} by the sessions that share a step (p50 / p99 ms):"
    yield ""
    yield "| sessions | gateway | bare | gateway, processors awake | bare, processors awake |"
    yield "|" + "---|" * 5
    for batch in sorted({args.batch // 4 or 1, args.batch // 2 or 1, args.batch}):
        load = Load(FEW, args.rate, args.seconds, batch)
        asleep = measure_gateways(folder, load), measure_bare(load)
        with parts.awake():
            awake = measure_gateways(folder, load), measure_bare(load)
        cells = (f"{m.quantile(0.5):.1f} / {m.quantile(0.99):.1f}" for m in (*asleep, *awake))
        yield f"| {batch} | {' | '.join(cells)} |"


def slow_readers(folder: Path, args: argparse.Namespace) -> str:
    """Say what clients that never read cost the others."""
    load = Load(FEW, args.rate, args.seconds, args.batch)
    alone, beside, megabytes = measure_slow_readers(folder, load)
    return (
        f"- {SLOW_READERS} clients that never read, beside {FEW} streams: p50 / p99 "
        f"{alone.quantile(0.5):.1f} / {alone.quantile(0.99):.1f} ms without, "
        f"{beside.quantile(0.5):.1f} / {beside.quantile(0.99):.1f} ms with them; "
        f"{megabytes / SLOW_READERS:.2f} MB of the gateway each; gaps {beside.gaps}."
    )


def two_gateways(folder: Path, args: argparse.Namespace) -> str:
    """Say what two gateways do with twice the load of one."""
    one = measure_gateways(folder, Load(MIDDLE // 2, args.rate, args.seconds, args.batch))
    load = Load(MIDDLE // 2 * 2, args.rate, args.seconds, args.batch)
    two = measure_gateways(folder, load, gateways=2)
    times = two.events / one.events
    return (
        f"- Two gateways: {two.events / two.seconds:.0f} events/s over both at {two.micros:.1f} µs "
        f"of CPU per event (p99 {two.quantile(0.99):.1f} ms, machine {two.busy:.0%} busy), one "
        f"alone {one.events / one.seconds:.0f} at {one.micros:.1f} µs "
        f"(p99 {one.quantile(0.99):.1f} ms, {one.busy:.0%}): {times:.2f} times the events, and by "
        f"CPU time two carry {2 * one.micros / two.micros:.2f} times what one does; gaps "
        f"{one.gaps + two.gaps}. How much two can carry at most takes more cores to see than this "
        f"machine's {os.cpu_count()}, which clients, worker and Redis share with them."
    )


def proxied(folder: Path, args: argparse.Namespace, direct: Measured) -> str:
    """Say what nginx in front costs."""
    load = Load(MIDDLE, args.rate, args.seconds, args.batch)
    got = measure_proxied(folder, load)
    if got is None:
        return "- nginx in front: not installed, not measured."
    nginx = got.proxy_cpu / got.events * 1e6
    return (
        f"- nginx in front, {load.streams} streams: {nginx:.1f} µs of nginx and {got.micros:.1f} "
        f"of the gateway per event (directly: {direct.micros:.1f}); p50 / p99 "
        f"{got.quantile(0.5):.1f} / {got.quantile(0.99):.1f} ms (directly: "
        f"{direct.quantile(0.5):.1f} / {direct.quantile(0.99):.1f}); machine {got.busy:.0%} busy; "
        f"gaps {got.gaps}."
    )


def report(args: argparse.Namespace, rows: list[Row]) -> Iterator[str]:
    """Measure, yield the report's lines as they come, and add to `rows` what the tables hold."""
    versions = ", ".join(f"{n} {version(n)}" for n in ("starlette", "uvicorn", "redis", "hiredis"))
    yield f"# Relay, {dt.datetime.now(dt.timezone.utc):%Y-%m-%d}"
    yield ""
    yield (
        f"`{args.command}`; Python {platform.python_version()}, {versions}; {os.cpu_count()} "
        f"cores, load {os.getloadavg()[0]:.1f} at the start; groups of {args.batch} sessions."
    )
    yield ""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        loads = [Load(n, args.rate, args.seconds, args.batch) for n in args.streams]
        rows += pairs(folder, loads)
        yield from table(rows)
        yield ""
        yield f"{TARGETS} {SATURATED}"
        if args.quick:
            return
        yield ""
        yield f"The same {args.total:g} events/s over more and more streams:"
        yield ""
        loads = [Load(n, args.total / n, args.seconds, args.batch) for n in args.streams]
        same = pairs(folder, loads)
        rows += same
        yield from table(same)
        yield ""
        yield growth(same)
        yield ""
        yield from bursts(folder, args)
        yield ""
        longest = max(max(ours.gc_ms, ours.gc_start_ms) for _, ours, _ in rows)
        yield (
            f"- The gateways' longest pause for the garbage collector: {longest:.1f} ms, the "
            "opening of all streams included."
        )
        yield slow_readers(folder, args)
        yield two_gateways(folder, args)
        middle = min(rows[: len(args.streams)], key=lambda row: abs(row[0].streams - MIDDLE))
        yield proxied(folder, args, middle[1])


def summary(load: Load, ours: Measured, bare: Measured) -> dict[str, Any]:
    """Return a row's figures for machines to read."""

    def of(measured: Measured) -> dict[str, Any]:
        figures = asdict(measured)
        del figures["latencies"]
        quantiles = {f"p{round(q * 100)}_ms": measured.quantile(q) for q in (0.5, 0.9, 0.99)}
        return {**figures, "cpu_us_per_event": measured.micros, **quantiles}

    return {"load": asdict(load), "gateway": of(ours), "bare": of(bare)}


def save(args: argparse.Namespace, lines: list[str], rows: list[Row]) -> None:
    """Write the report to `benchmarks/results`, as text and as JSON."""
    folder = parts.ROOT / "benchmarks" / "results"
    folder.mkdir(exist_ok=True)
    path = folder / f"relay-{dt.datetime.now(dt.timezone.utc):%Y-%m-%d}.md"
    path.write_text("\n".join(lines) + "\n")
    figures = {"command": args.command, "rows": [summary(*row) for row in rows]}
    path.with_suffix(".json").write_text(json.dumps(figures, indent=1) + "\n")
    print(f"saved to {path.relative_to(parts.ROOT)}, and .json beside it")


def main() -> None:
    """Read the command line, measure, print, and save where asked to."""
    parser = argparse.ArgumentParser(prog="run.py bench relay", description=__doc__)
    parser.add_argument("--streams", type=int, nargs="+", default=[100, 500, 2000])
    parser.add_argument("--rate", type=float, default=20, help="events per second and stream")
    parser.add_argument(
        "--total", type=float, default=6000, help="events per second of the second table"
    )
    parser.add_argument("--seconds", type=float, default=5, help="length of each measurement")
    parser.add_argument("--batch", type=int, default=32, help="sessions that share a worker's step")
    parser.add_argument("--quick", action="store_true", help="the first table alone")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/relay-….md")
    args = parser.parse_args()
    args.command = "python3 run.py bench relay --streams " + " ".join(map(str, args.streams))
    args.command += f" --rate {args.rate:g} --total {args.total:g} --seconds {args.seconds:g}"
    args.command += f" --batch {args.batch}"
    lines: list[str] = []
    rows: list[Row] = []
    for line in report(args, rows):
        print(line, flush=True)
        lines.append(line)
    if args.save:
        save(args, lines, rows)


if __name__ == "__main__":
    main()
