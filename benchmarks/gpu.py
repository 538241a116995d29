"""The engine on one GPU: is it right, and how near the memory's speed does it come?

    python3 run.py bench [--no-install] gpu [--minutes 8] [--tiny] [--out PREFIX] [--sections …]

Random weights of Qwen3-VL-2B's shape, so that nothing is downloaded; the engine alone, without
Redis. Sections run in order of worth, each within its share of the time: what does not fit is
listed as left out, and `--sections` gives all the time to some. JSON is written after each figure,
so that a run which is cut off, or a crash of the device, leaves what was measured until then.
`--tiny` runs all of it with a tiny model, on a CPU too, in about a minute: it shows that the
benchmark works, and no more.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime as dt
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks._gpu_report import WRONG, aims, draw, markdown

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

# The sections in order, and what share each may have of the time that those before it have left.
SHARES = {
    "environment": 6,
    "correctness": 14,
    "generate": 3,
    "decode": 34,
    "determinism": 12,
    "large-batch": 13,
    "prefill": 4,
    "requests": 11,
    "continuous": 4,
    "static": 4,
    "requests-compiled": 2,  # an engine of this kind may need minutes: for a call of its own
}
GRACE = (
    90.0  # seconds that a figure under way, a compilation too, may take beyond its section's end
)
COLD = 120.0  # seconds after which a process says something, from a slow disk too
LEAST = 15.0  # seconds below which no further process is started
TINY_MINUTES = 2.5
CHILD = (sys.executable, "-m", "benchmarks._gpu_child")
KINDS = ("decode", "large-batch", "determinism")  # sections whose cells are of kinds
FATAL = ("its process ended", "AcceleratorError")  # how what such a cell says begins
NO_GPU = 4  # its exit code where only `--tiny` can run

Report = dict[str, Any]


class Run:
    """One run of the benchmark, and what it has found so far.

    Args:
        args: the command line.
        child: starts the process that measures.
    """

    def __init__(self, args: argparse.Namespace, child: Sequence[str] = CHILD) -> None:
        self._args, self._child, self._began = args, child, time.monotonic()
        self._seconds = 60.0 * args.minutes
        self.report: Report = {
            "date": f"{dt.datetime.now(dt.timezone.utc):%Y-%m-%d}",
            "tiny": args.tiny,
            "minutes": args.minutes,
            "load": os.getloadavg()[0],
            "complete": False,
            "deaths": 0,
            "sections": {
                name: {"status": "not run", "cells": {}, "left_out": []} for name in args.sections
            },
        }

    def measure(self) -> None:
        """Run the sections; another process takes over behind one that died or hung."""
        left = list(self._args.sections)
        while left and self._left() > LEAST:
            left = self._process(left)
        self.report["complete"] = not left
        self.report["seconds"] = time.monotonic() - self._began
        self.save()

    @property
    def well(self) -> bool:
        """Whether it came to its end, no process died, and nothing that was checked is wrong."""
        wrong = any(aim["said"] == WRONG for aim in self.report["aims"])
        return bool(self.report["complete"]) and not self.report["deaths"] and not wrong

    def save(self) -> None:
        """Write all that is known; whoever reads finds an old or a new file, and a whole one."""
        self.report["aims"] = aims(self.report)
        if (prefix := self._prefix()) is not None:
            path = prefix.with_name(prefix.name + ".json")
            path.parent.mkdir(parents=True, exist_ok=True)
            fresh = path.with_name(path.name + ".new")
            fresh.write_text(json.dumps(self.report, indent=1) + "\n")
            fresh.replace(path)

    def finish(self) -> None:
        """Write and print the text; draw the chart where matplotlib is installed."""
        text = markdown(self.report)
        print(text)
        if (prefix := self._prefix()) is not None:
            prefix.with_name(prefix.name + ".md").write_text(text)
            with contextlib.suppress(ImportError):
                draw(self.report, prefix.with_name(prefix.name + ".png"))

    def _prefix(self) -> Path | None:
        """Return where results go: nowhere by default, unless a GPU ran the real model."""
        if self._args.out:
            return Path(self._args.out)
        versions = self.report["sections"].get("environment", {}).get("cells", {}).get("versions")
        on_gpu = bool(versions and versions.get("cuda") and not self._args.tiny)
        return RESULTS / f"gpu-{self.report['date']}" if on_gpu else None

    def _left(self) -> float:
        return self._began + self._seconds - time.monotonic()

    def _process(self, sections: list[str]) -> list[str]:
        """Have a process measure; return the sections that are left when it has ended."""
        job = {
            "tiny": self._args.tiny,
            "until": self._began + self._seconds,  # by a clock that all processes share
            "sections": [[name, SHARES[name]] for name in sections],
            "skip": list(self.report["sections"][sections[0]]["cells"]),
            "lost": self._lost(sections[0]),
        }
        child = subprocess.Popen(
            [*self._child, json.dumps(job)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            return self._follow(child, sections)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)  # compilers have processes of their own
            child.wait()

    def _lost(self, section: str) -> list[str]:
        """List the kinds of cells that a process has died of: the others of a kind would kill too.

        A kind is a name's first word. It says nothing in the other sections.
        """
        if section not in KINDS:
            return []
        cells = self.report["sections"][section]["cells"].items()
        fatal = [cell for cell, found in cells if str(found.get("failed")).startswith(FATAL)]
        return sorted({cell.split()[0] for cell in fatal})

    def _follow(self, child: subprocess.Popen[str], sections: list[str]) -> list[str]:
        lines = queue.Queue[str]()
        threading.Thread(target=_feed, args=(child, lines), daemon=True).start()
        left, known = list(sections), len(self.report["sections"][sections[0]]["cells"])
        until = time.monotonic() + COLD
        while left:
            section = self.report["sections"][left[0]]
            patience = min(until - time.monotonic(), self._left())
            try:
                line = lines.get(timeout=max(patience, 0.1))
            except queue.Empty:
                section["status"] = "cut"
                section["left_out"].append(section.pop("cell", "the process did not begin"))
                self.save()
                return left[1:]
            if not line:
                return self._died(child.wait(), left, known)
            told = json.loads(line)
            if told.get("event") == "begin":
                until = time.monotonic() + told["seconds"] + GRACE
            if self._take(told):
                left.pop(0)
                known = 0
        return left

    def _died(self, code: int, left: list[str], known: int) -> list[str]:
        """Note that a process died; return what is left: its section too, if it had got on."""
        section, why = self.report["sections"][left[0]], f"{FATAL[0]} with {code}"
        if code == NO_GPU:
            self._seconds = 0.0  # another process finds none either
        self.report["deaths"] += 1
        if cell := section.pop("cell", ""):
            section["cells"][cell] = {"failed": why}
        section["status"] = f"failed: {why}"
        self.save()
        return left if len(section["cells"]) > known else left[1:]

    def _take(self, told: Report) -> bool:
        """Note what a line says; return whether it ends a section."""
        section = self.report["sections"][told["section"]]
        event = told.get("event")
        if event == "begin":
            section["status"] = "running"
        elif event == "cell":
            section["cell"] = told["cell"]
            print(f"{told['section']}: {told['cell']}", file=sys.stderr, flush=True)
        elif event == "end":
            section["left_out"] += told["left_out"]
            section["status"] = "cut" if section["left_out"] else "done"
        else:
            section.pop("cell", None)
            section["cells"][told["cell"]] = told["figures"]
        self.save()
        return event == "end"


def _feed(child: subprocess.Popen[str], lines: queue.Queue[str]) -> None:
    """Pass on a process's lines, and an empty one at its end."""
    assert child.stdout is not None
    with child.stdout:
        for line in child.stdout:
            lines.put(line)
    lines.put("")


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="run.py bench gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--minutes", type=float, help="most minutes it takes (8; tiny: 2.5)")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, on a CPU too")
    parser.add_argument("--out", help="write PREFIX.json, .md and .png there")
    parser.add_argument("--sections", nargs="+", choices=list(SHARES), default=list(SHARES))
    args = parser.parse_args()
    args.minutes = args.minutes or (TINY_MINUTES if args.tiny else 8.0)
    always = next(iter(SHARES))  # what the verdicts stand on
    args.sections = [name for name in SHARES if name in {always, *args.sections}]
    return args


def main() -> int:
    """Measure, save and print; the exit code is 1 where something is wrong or died."""
    run = Run(parse())
    try:
        run.measure()
    finally:
        run.finish()
    return int(not run.well)


if __name__ == "__main__":
    sys.exit(main())
