"""The process that measures for the GPU benchmark; told what, it answers in JSON lines.

`python -m benchmarks._gpu_child '{"tiny": …, "until": …, "sections": [["name", SHARE], …],
"skip": […], "lost": […]}'`: a section may begin new cells for its share of the time that is left
until then, a value of the monotonic clock. Cells to skip, of the first section, have been tried.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from functools import partial
from typing import Any

from benchmarks._gpu_bare import stand_in

stand_in()  # before anything of the engine is imported
# ruff: noqa: E402

from worker.engine.torchvision_shim import prepare_torchvision

prepare_torchvision()

import torch

from benchmarks._gpu_bench import READY, Bench
from benchmarks._gpu_checks import correctness, determinism, environment
from benchmarks._gpu_peers import continuous, generate, static
from benchmarks._gpu_requests import requests, requests_compiled
from benchmarks._gpu_speed import decode, large_batch, prefill

SECTIONS = {
    "environment": environment,
    "correctness": correctness,
    "generate": generate,
    "decode": decode,
    "determinism": determinism,
    "large-batch": large_batch,
    "prefill": prefill,
    "requests": requests,
    "continuous": continuous,
    "static": static,
    "requests-compiled": requests_compiled,
}
NO_GPU = 4  # as in gpu.py
LOST_DEVICE = 3  # exit code: what comes next needs another process


class Reporter:
    """Writes JSON lines to what was standard output; whatever else prints goes to the log."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def say(self, section: str, **told: Any) -> None:
        """Write a line."""
        self._out.write(json.dumps({"section": section, **told}) + "\n")
        self._out.flush()


def run_section(
    reporter: Reporter, name: str, bench: Bench, seconds: float, skip: list[str], lost: list[str]
) -> None:
    """Measure cell by cell, as long as there is time; say what came of each, and what did not.

    Cells to `skip` have been tried; of those `lost`, by their first word, a process has died. A
    section's time begins anew when it is ready.
    """
    bench.until = time.monotonic() + seconds
    reporter.say(name, event="begin", seconds=seconds)
    left_out = []
    for cell, measure in SECTIONS[name](bench):
        if cell in skip:
            continue
        if time.monotonic() > bench.until or cell.split()[0] in lost:
            left_out.append(cell)
            continue
        began = time.monotonic()
        reporter.say(name, event="cell", cell=cell)
        try:
            figures = measure()
        except torch.AcceleratorError as error:
            reporter.say(name, cell=cell, figures={"failed": said(error)})
            sys.exit(LOST_DEVICE)
        except Exception as error:  # noqa: BLE001 - one cell's failure is a finding
            figures = {"failed": said(error)}
        figures["seconds"] = time.monotonic() - began
        reporter.say(name, cell=cell, figures=figures)
        if cell.endswith(READY):
            bench.until = time.monotonic() + seconds
            reporter.say(name, event="begin", seconds=seconds)
    reporter.say(name, event="end", left_out=left_out)


def said(error: Exception) -> str:
    """Return the first line of an error, with its kind."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def main() -> None:
    """Run the sections that the command line names."""
    job = json.loads(sys.argv[1])
    reporter = Reporter()
    gc.collect()
    gc.freeze()  # a collection, each time that memory is given back, need not look at libraries
    bench = Bench(tiny=job["tiny"])
    if not bench.cuda:
        if not job["tiny"]:
            print("there is no GPU: only --tiny runs without", file=sys.stderr)
            sys.exit(NO_GPU)
        torch.set_num_threads(1)
        # Generating code for a CPU takes longer than all the rest, and would tell nothing of a GPU.
        torch.compile = partial(torch.compile, backend="eager")
    shares = [share for _, share in job["sections"]]
    for number, (name, share) in enumerate(job["sections"]):
        left = job["until"] - time.monotonic()
        skip, lost = ([], []) if number else (job["skip"], job["lost"])
        run_section(reporter, name, bench, left * share / sum(shares[number:]), skip, lost)


if __name__ == "__main__":
    main()
