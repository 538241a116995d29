"""Tokens per second and latency of this stack, beside what people would use instead.

    python3 run.py bench engine [--quick] [--peer URL …]

In one run, on the same models, prompts and lengths, alternating: this stack over HTTP, the engine
alone, `generate()` on a static batch (what batching could give at best), `transformers serve`, and
any OpenAI-compatible server that `--peer` names. Closed loop, greedy, tokens counted by `usage`.
Table, numbers and chart go to `benchmarks/results/`; `--quick` takes two minutes and saves nothing.
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
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks import _engine_http as http
from benchmarks._engine_work import ROOT, model_folder

RESULTS = ROOT / "benchmarks" / "results"
LOCAL = {"engine": "engine alone", "generate": "generate(), static"}
CROWD = 16
GOALS = """\
Aims for the demo model with text, 2 cores: this stack at least 0.9, 2, 6 and 8 times \
`transformers serve` at 1, 4, 16 and 32 streams; engine alone at least 1.0 times `generate()` from \
4 streams on; with images, the gap between tokens at p99 at most 3 times that at p50."""

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
    gaps = sorted(http.gaps(found))
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
    for workload, streams in itertools.product(args.workloads, args.streams):
        load = (streams, rounds_for(streams), args.tokens[model])
        found: dict[str, list[Row]] = {name: [] for name in targets}
        for target in targets.values():  # warm up
            measure_once(target, local, workload, (1, 1, 4), next(fresh))
        for _ in range(args.repeats):
            for name, target in targets.items():
                found[name].append(measure_once(target, local, workload, load, next(fresh)))
        for name, runs in found.items():
            medians = {k: statistics.median(run[k] for run in runs) for k in runs[0]}
            yield {"model": model, "workload": workload, "streams": streams, "who": name, **medians}


def first_token_rows(model: str, server: http.Server, args: argparse.Namespace) -> Iterator[Row]:
    """Measure the first token of a lone request, and of one that comes while others decode."""
    fresh = itertools.count(900_001, 1000)
    for workload in args.workloads:
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
        for url in args.peer:
            targets[url] = http.Server(url, url, {"ignore_eos": True, "model": args.peer_model})
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
    for ours, other in (("this stack", "transformers serve"), tuple(LOCAL.values())):
        if (other, counts[0]) in rate:
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


def report(rows: list[Row], first: list[Row], args: argparse.Namespace) -> str:
    """Write all figures as Markdown."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    lines = [
        f"# Engine, {args.day}",
        f"\n`python3 run.py bench engine`; Python {platform.python_version()}, {versions}, "
        f"float32; {os.cpu_count()} cores, load {args.load:.1f} at the start and "
        f"{os.getloadavg()[0]:.1f} at the end; medians of {args.repeats}, tokens per answer: "
        + ", ".join(f"{model} {args.tokens[model]}" for model in args.models)
        + ".",
        *table(rows),
        f"\n## First token of one more request, ms: alone, and while {CROWD} others decode\n",
        "| model | workload | alone | among others |",
        "|---|---|---|---|",
    ]
    for row in first:
        alone, among = row["first_ms_0"], row[f"first_ms_{CROWD}"]
        lines.append(f"| {row['model']} | {row['workload']} | {alone:.0f} | {among:.0f} |")
    return "\n".join([*lines, "", GOALS, ""])


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="run.py bench engine", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="demo model, text, once")
    parser.add_argument("--models", nargs="+", choices=["demo", "large"])
    parser.add_argument("--workloads", nargs="+", choices=["text", "image", "mixed"])
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 16, 32])
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--probes", type=int, help="requests to time the first token of")
    parser.add_argument("--threads", type=int, default=1, help="of the engine alone")
    parser.add_argument("--peer", action="append", default=[], help="another server's address")
    parser.add_argument("--peer-model", default="any", help="the model's name there")
    parser.add_argument("--no-serve", action="store_true", help="leave out transformers serve")
    args = parser.parse_args()
    args.models = args.models or (["demo"] if args.quick else ["demo", "large"])
    args.workloads = args.workloads or (["text"] if args.quick else ["text", "image", "mixed"])
    args.repeats = args.repeats or (1 if args.quick else 3)
    args.probes = args.probes or (3 if args.quick else 7)
    args.tokens = {"demo": 32, "large": 16} if args.quick else {"demo": 64, "large": 24}
    args.load, args.day = os.getloadavg()[0], f"{dt.datetime.now(dt.timezone.utc):%Y-%m-%d}"
    return args


def main() -> None:
    """Measure, print, and save unless it was the quick form."""
    args = parse()
    rows, first = [], []
    for model in args.models:
        found = run_model(model, args)
        rows += found[0]
        first += found[1]
    text = report(rows, first, args)
    print(text)
    if not args.quick:
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"engine-{args.day}"
        path.with_suffix(".md").write_text(text)
        numbers = {"load": args.load, "throughput": rows, "first_token": first}
        path.with_suffix(".json").write_text(json.dumps(numbers, indent=1) + "\n")
        draw(rows, path.with_suffix(".png"))
        print(f"saved to {path.relative_to(ROOT)}.md, .json, .png")


if __name__ == "__main__":
    main()
