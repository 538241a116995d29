"""Tokens per second and latency of this stack, beside what people would use instead.

    python3 run.py bench engine [--quick | --minutes 30 | --profile] [--peer vLLM=URL …]

In one run, on the same models, prompts and lengths, alternating: this stack over HTTP, the engine
alone, `generate()` on a static batch (what batching could give at best), `transformers serve`, and
any OpenAI-compatible server that `--peer [NAME=]URL` tells of. Closed loop, greedy, tokens counted
by `usage`. Table, numbers and chart go to `benchmarks/results/`. It ends in about `--minutes` (12),
and says what was left out for that; `--quick` takes two minutes and saves nothing; `--profile`
tells only where a step's time goes.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime as dt
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks import _engine_http as http
from benchmarks._engine_work import ROOT, model_folder

RESULTS = ROOT / "benchmarks" / "results"
MODELS = ("demo", "large")
LOCAL = {"engine": "engine alone", "generate": "generate(), static"}
CROWD = 16
SERVE_AIMS = {1: 0.9, 4: 2.0, 16: 6.0, 32: 8.0}
PROFILED = [1, 4, 16, 32]

Row = dict[str, Any]


class LocalRunner:
    """The process that runs the engine alone and `generate()`, asked over a pipe."""

    def __init__(self, model: Path, threads: int) -> None:
        argv = [sys.executable, "-m", "benchmarks._engine_local", str(model), str(threads)]
        self.process = subprocess.Popen(
            argv, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> LocalRunner:  # noqa: PYI034 - Python 3.10 has no Self
        return self

    def __exit__(self, *_exc: object) -> None:
        self.process.kill()
        self.process.wait()

    def run(self, what: str, workload: str, load: tuple[int, int, int], first: int) -> Row:
        """Measure once; returns `rate` and, for the engine, `p50_ms` and `p99_ms`."""
        streams, rounds, tokens = load
        job = {"what": what, "workload": workload, "streams": streams, "rounds": rounds}
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({**job, "tokens": tokens, "first": first}) + "\n")
        self.process.stdin.flush()
        return dict(json.loads(self.process.stdout.readline()))


def measure_once(
    target: str | http.Server,
    local: LocalRunner,
    workload: str,
    load: tuple[int, int, int],
    at: int,
) -> Row:
    """Measure one of the contenders once: tokens per second, and the gaps between tokens."""
    if isinstance(target, str):
        return local.run(target, workload, load, at)
    rate, found = http.closed_loop(target, workload, *load, at)
    gaps = sorted(http.gaps(found)) or [0.0]  # a short answer may be half a character
    high = gaps[min(len(gaps) - 1, int(len(gaps) * 0.99))]
    return {"rate": rate, "p50_ms": statistics.median(gaps) * 1000, "p99_ms": high * 1000}


def rounds_for(streams: int) -> int:
    """Return how many requests one after the other each stream makes."""
    return 4 if streams == 1 else 2 if streams < 16 else 1


def measure(
    model: str, targets: dict[str, str | http.Server], local: LocalRunner, args: argparse.Namespace
) -> Iterator[Row]:
    """Measure all contenders, one after the other in each repeat; yields medians."""
    fresh = itertools.count(1, 1000)  # numbers of conversations: none comes twice
    for workload, streams in itertools.product(args.workloads[model], args.streams[model]):
        if time.monotonic() > args.deadline:
            args.left_out.append(f"{model} {workload} {streams}")
            continue
        load = (streams, rounds_for(streams), args.tokens[model])
        found: dict[str, list[Row]] = {name: [] for name in targets}
        for target in targets.values():  # warm up
            measure_once(target, local, workload, (1, 1, 4), next(fresh))
        for repeat in range(args.repeats):  # each time another one begins
            names = deque(targets)
            names.rotate(-repeat)
            for name in names:
                found[name].append(measure_once(targets[name], local, workload, load, next(fresh)))
                time.sleep(4 if args.peer else 0)  # vLLM spins for 3 s after its turn
        for name, runs in found.items():
            medians = {k: statistics.median(run[k] for run in runs) for k in runs[0]}
            yield {"model": model, "workload": workload, "streams": streams, "who": name, **medians}


def first_token_rows(model: str, server: http.Server, args: argparse.Namespace) -> Iterator[Row]:
    """Measure the first token of a lone request, and of one that comes while others decode."""
    fresh = itertools.count(900_001, 1000)
    for workload in args.workloads[model]:
        row: Row = {"model": model, "workload": workload}
        for crowd in (0, CROWD):
            found = http.first_tokens(server, workload, crowd, args.probes, next(fresh))
            row[f"first_ms_{crowd}"] = statistics.median(found) * 1000
        yield row


def run_model(model: str, args: argparse.Namespace) -> tuple[list[Row], list[Row]]:
    """Start the contenders for one model and measure them."""
    folder = model_folder(model)
    with contextlib.ExitStack() as stack:
        data = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        ours = stack.enter_context(http.our_stack(folder, data / "data"))
        local = stack.enter_context(LocalRunner(folder, args.threads))
        targets: dict[str, str | http.Server] = {ours.name: ours}
        targets |= {name: what for what, name in LOCAL.items()}
        if not args.no_serve:
            serve = stack.enter_context(http.transformers_serve(folder))
            targets[serve.name] = serve
        for given in args.peer if model == args.models[0] else ():
            name, _, url = given.rpartition("=")
            extra = {"ignore_eos": True, "model": args.peer_model}
            targets[name or url] = http.Server(name or url, url, extra)
        rows = []
        for row in measure(model, targets, local, args):
            rows.append(row)
            print(f"{model} {row['workload']} {row['streams']}: {row['who']} {row['rate']:.0f}/s")
        return rows, list(first_token_rows(model, ours, args))


def table(rows: list[Row]) -> Iterator[str]:
    """Yield a table per model and workload: tokens per second and gaps, per number of streams."""
    key = lambda row: (row["model"], row["workload"])  # noqa: E731
    for (model, workload), group in itertools.groupby(rows, key):
        part = list(group)
        names = list(dict.fromkeys(row["who"] for row in part))
        yield f"\n## {model}, {workload}: tokens/s (gap between tokens, p50 / p99 ms)\n"
        yield "| streams | " + " | ".join(names) + " |"
        yield "|" + "---|" * (len(names) + 1)
        for streams, line in itertools.groupby(part, lambda row: row["streams"]):
            cells = [
                f"{row['rate']:.0f}"
                + (f" ({row['p50_ms']:.0f} / {row['p99_ms']:.0f})" if "p50_ms" in row else "")
                for row in line
            ]
            yield f"| {streams} | " + " | ".join(cells) + " |"
        yield ""
        yield from ratios(part)


def ratios(rows: list[Row]) -> Iterator[str]:
    """Yield what the aims are stated in: ratios within one run."""
    rate = {(row["who"], row["streams"]): row["rate"] for row in rows}
    counts = sorted({row["streams"] for row in rows})
    others = [name for name, _ in rate if name not in ("this stack", *LOCAL.values())]
    pairs = [("this stack", name) for name in dict.fromkeys(others)]
    for ours, other in (*pairs, tuple(LOCAL.values())):
        if (ours, counts[0]) in rate and (other, counts[0]) in rate:
            each = ", ".join(f"{rate[ours, n] / rate[other, n]:.2f} at {n}" for n in counts)
            yield f"{ours} / {other}: {each}.\n"


def draw(rows: list[Row], path: Path) -> None:
    """Draw tokens per second over streams, a panel per model and workload."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    panels = list(dict.fromkeys((row["model"], row["workload"]) for row in rows))
    figure, axes = plt.subplots(
        1, len(panels), figsize=(4.2 * len(panels), 3.8), squeeze=False, layout="constrained"
    )
    for axis, panel in zip(axes[0], panels, strict=True):
        part = [row for row in rows if (row["model"], row["workload"]) == panel]
        for name in dict.fromkeys(row["who"] for row in part):
            mine = [row for row in part if row["who"] == name]
            axis.plot([r["streams"] for r in mine], [r["rate"] for r in mine], "o-", label=name)
        axis.set(title=", ".join(panel), xlabel="streams", ylabel="tokens/s", ylim=(0, None))
        axis.set_xscale("log", base=2)
        axis.set_xticks(counts := sorted({row["streams"] for row in part}), map(str, counts))
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize="small")
    figure.savefig(path, dpi=120)


def heading(args: argparse.Namespace, more: str) -> list[str]:
    """Return what a report begins with: what ran, on what, beside what load."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    told = (
        f"\n`python3 run.py bench engine`; Python {platform.python_version()}, {versions}, "
        f"float32; {os.cpu_count()} cores, load {args.load:.1f} at the start and "
        f"{os.getloadavg()[0]:.1f} at the end{more}."
    )
    return [f"# Engine, {args.day}", told]


def report(rows: list[Row], first: list[Row], args: argparse.Namespace) -> str:
    """Write all figures as Markdown."""
    answers = ", ".join(f"{model} {args.tokens[model]}" for model in args.models)
    lines = [
        *heading(args, f"; medians of {args.repeats}, tokens per answer: {answers}"),
        *([f"\nLeft out for want of time: {', '.join(args.left_out)}."] if args.left_out else []),
        *table(rows),
        f"\n## First token of one more request, ms: alone, and while {CROWD} others decode\n",
        "| model | workload | alone | among others |",
        "|---|---|---|---|",
    ]
    for row in first:
        alone, among = row["first_ms_0"], row[f"first_ms_{CROWD}"]
        lines.append(f"| {row['model']} | {row['workload']} | {alone:.0f} | {among:.0f} |")
    lines += [
        "",
        "## The aims (demo model, 2 cores)",
        "",
        "| | aim | here | |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {what} | {aim} | {here:.2f} | {said} |" for what, aim, here, said in aims(rows, first)
    ]
    return "\n".join([*lines, *profile_table(args.profiled), ""])


def aims(rows: list[Row], first: list[Row]) -> Iterator[tuple[str, str, float, str]]:
    """Yield what is aimed at, what came of it, and whether that is enough."""
    told = {True: "yes", False: "**no**"}
    demo = [row for row in rows if row["model"] == "demo"]
    rate = {(r["who"], r["streams"]): r["rate"] for r in demo if r["workload"] == "text"}
    pairs = [(n, least, "this stack", "transformers serve") for n, least in SERVE_AIMS.items()]
    pairs += [(n, 1.0, *LOCAL.values()) for n in (4, 16, 32)]
    for streams, least, who, other in pairs:
        if (who, streams) in rate and (other, streams) in rate:
            here = rate[who, streams] / rate[other, streams]
            yield f"{who} / {other}, {streams} streams", f"≥ {least}", here, told[here >= least]
    for row in demo:
        if row["workload"] == "mixed" and row["who"] == "this stack" and row["streams"] > 1:
            here = row["p99_ms"] / row["p50_ms"]
            yield f"gap p99 / p50, mixed, {row['streams']} streams", "≤ 3", here, told[here <= 3]
    for row in first:
        here = row[f"first_ms_{CROWD}"] / row["first_ms_0"]
        what = f"first token among {CROWD} / alone, {row['model']} {row['workload']}"
        yield what, "≤ 2 (one prefill more)", here, told[here <= 2]


def profile(folder: Path, threads: int, streams: list[int]) -> list[Row]:
    """Return where the processor's time goes in a decode step of the engine, in milliseconds."""
    argv = [sys.executable, "-m", "benchmarks._engine_profile", str(folder), str(threads)]
    done = subprocess.run([*argv, *map(str, streams)], cwd=ROOT, check=True, stdout=subprocess.PIPE)
    return [json.loads(line) for line in done.stdout.splitlines()]


def profile_table(profiled: list[Row]) -> Iterator[str]:
    """Yield that as a table: a column per number of streams."""
    if not profiled:
        return
    yield "\n## Where a decode step's time goes: ms of processor time (share), demo model, text\n"
    yield "| part | " + " | ".join(f"{row['streams']} streams" for row in profiled) + " |"
    yield "|---" * (len(profiled) + 1) + "|"
    totals = [sum(v for k, v in row.items() if k != "streams") for row in profiled]
    for part in [name for name in profiled[0] if name != "streams"]:
        cells = [
            f"{row[part]:.2f} ({row[part] / total:.0%})"
            for row, total in zip(profiled, totals, strict=True)
        ]
        yield f"| {part} | " + " | ".join(cells) + " |"
    yield "| sum | " + " | ".join(f"{total:.2f}" for total in totals) + " |"


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="run.py bench engine", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="demo model, text, once")
    parser.add_argument("--models", nargs="+", choices=MODELS)
    parser.add_argument("--workloads", nargs="+", choices=["text", "image", "mixed"])
    parser.add_argument("--streams", type=int, nargs="+")
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--minutes", type=float, default=12, help="begin nothing after so long")
    parser.add_argument("--profile", action="store_true", help="only where a step's time goes")
    parser.add_argument("--probes", type=int, help="requests to time the first token of")
    parser.add_argument("--threads", type=int, default=1, help="of the engine alone")
    parser.add_argument("--peer", action="append", default=[], help="[NAME=]URL; first model")
    parser.add_argument("--peer-model", default="any", help="the model's name there")
    parser.add_argument("--no-serve", action="store_true", help="leave out transformers serve")
    args = parser.parse_args()
    args.models = args.models or (["demo"] if args.quick else ["demo", "large"])
    every = ["text"] if args.quick else ["text", "mixed", "image"]
    args.workloads = {m: args.workloads or (every if m == "demo" else every[:1]) for m in MODELS}
    counts = {"demo": [1, 4, 16, 32], "large": [1, 4, 16]}
    args.streams = {model: args.streams or counts[model] for model in MODELS}
    args.repeats = args.repeats or (1 if args.quick else 3)
    args.probes = args.probes or (3 if args.quick else 7)
    args.tokens = {"demo": 32, "large": 16} if args.quick else {"demo": 48, "large": 12}
    args.load, args.day = os.getloadavg()[0], f"{dt.datetime.now(dt.timezone.utc):%Y-%m-%d}"
    args.deadline, args.left_out, args.profiled = time.monotonic() + args.minutes * 54, [], []
    return args


def main() -> None:
    """Measure, print, and save unless it was the quick form."""
    args = parse()
    if args.profile:
        args.profiled = profile(model_folder("demo"), args.threads, args.streams["demo"])
        text = "\n".join([*heading(args, "; `--profile`"), *profile_table(args.profiled), ""])
        print(text)
        (RESULTS / f"engine-profile-{args.day}.md").write_text(text)
        return
    rows, first = [], []
    for model in args.models:
        found = run_model(model, args)
        rows += found[0]
        first += found[1]
    if not args.quick:
        args.profiled = profile(model_folder("demo"), args.threads, PROFILED)
    text = report(rows, first, args)
    print(text)
    if not args.quick:
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"engine-{args.day}"
        path.with_suffix(".md").write_text(text)
        numbers = {"load": args.load, "throughput": rows, "first_token": first}
        numbers["step"] = args.profiled
        path.with_suffix(".json").write_text(json.dumps(numbers, indent=1) + "\n")
        draw(rows, path.with_suffix(".png"))
        print(f"saved to {path.relative_to(ROOT)}.md, .json, .png")


if __name__ == "__main__":
    main()
