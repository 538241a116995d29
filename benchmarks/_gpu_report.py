"""The GPU benchmark's aims, text and chart, from its JSON alone: also of a run that was cut off."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

Report = dict[str, Any]
Figures = dict[str, Any]

BEST = "compiled"  # the last stage
LATER = {"ragged": "eager", "graph": "ragged", BEST: "graph"}
LEAST_SHARE = {1: 0.35, 64: 0.55}  # of the floor, at 1,024 tokens of context
FASTER = 8.0  # than `generate()`, one row
NOISE = 1.02  # below it, a later stage is as fast as the one before
HOST = 0.95  # of a step's time: beyond it the host may be what is waited for
STEPS = ("decode", "large-batch")  # sections of decode steps
REACHED, MISSED, NOT_RUN, WRONG = "reached", "missed", "not run", "WRONG"


def cells(report: Report, section: str) -> dict[str, Figures]:
    """Return a section's figures by cell, without those that failed or were left out."""
    found: dict[str, Figures] = report["sections"].get(section, {}).get("cells", {})
    return {
        name: figures
        for name, figures in found.items()
        if not {"failed", "left_out"} & figures.keys()
    }


def on_gpu(report: Report) -> bool:
    """Whether a GPU ran the real model."""
    return bool(cells(report, "environment").get("versions", {}).get("cuda")) and not report["tiny"]


def aims(report: Report) -> list[Figures]:
    """Return what is aimed at, what came of it, and whether that is enough.

    Speed is judged on a GPU with the real model alone, what is right everywhere.
    """
    return [*_speed(report), *_right(report)]


def _speed(report: Report) -> Iterator[Figures]:
    steps = cells(report, "decode") | cells(report, "large-batch") if on_gpu(report) else {}
    for batch, least in LEAST_SHARE.items():
        share = steps.get(f"{BEST} {batch} x 1024", {}).get("floor_share")
        what = f"share of the floor, batch {batch}, 1,024 tokens"
        yield _judged(what, f"≥ {least}", share, at_least=least)
    drawn = steps.get("drawn 1 x 1024", {}).get("ms")
    slow = cells(report, "generate").get("dynamic cache, 1", {}).get("ms")
    ratio = slow / drawn if slow and drawn else None
    yield _judged("one row, beside generate()", f"≥ {FASTER}x", ratio, at_least=FASTER)
    ratios = []
    for name, figures in steps.items():
        stage, _, place = name.partition(" ")
        before = steps.get(f"{LATER.get(stage)} {place}")
        if before:
            ratios.append(figures["ms"] / before["ms"])
    slowest = max(ratios, default=None)
    yield _judged("slowest stage beside the one before", f"≤ {NOISE}", slowest, at_most=NOISE)
    hosts = [f["host_ms"] / f["ms"] for name, f in steps.items() if name.startswith(BEST)]
    yield _judged("host's time in a step's", f"≤ {HOST}", max(hosts, default=None), at_most=HOST)


def _right(report: Report) -> Iterator[Figures]:
    passed = [f["passed"] for f in cells(report, "correctness").values() if "passed" in f]
    failed = report["sections"].get("correctness", {}).get("cells", {}).values()
    passed += [False for figures in failed if "failed" in figures]
    yield _held("attention and greedy decoding as exact as generate()", passed)
    scenes = cells(report, "determinism")
    # A prefill of the answer rounds otherwise on a GPU: that is what replay is for.
    exact = [
        figures["equal"]
        for name, figures in scenes.items()
        if name.startswith("exact") and "equal" in figures and "prefilled" not in name
    ]
    yield _held("EXACT=1: the same bits in every row, batch and takeover", exact)


def _judged(
    what: str,
    aim: str,
    here: float | None,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
) -> Figures:
    said = NOT_RUN
    if here is not None:
        good = (at_least is None or here >= at_least) and (at_most is None or here <= at_most)
        said = REACHED if good else MISSED
    return {"what": what, "aim": aim, "here": here, "said": said}


def _held(what: str, passed: list[bool]) -> Figures:
    here = f"{sum(passed)} of {len(passed)}" if passed else None
    said = NOT_RUN if not passed else REACHED if all(passed) else WRONG
    return {"what": what, "aim": "all", "here": here, "said": said}


def costs(report: Report) -> list[str]:
    """Say how much longer a step takes with EXACT=1."""
    scenes = cells(report, "determinism")
    told = [
        f"{figures['ms'] / scenes[fast]['ms']:.2f} times as long at batch {figures['batch']}"
        for name, figures in scenes.items()
        if (fast := name.replace("exact, step", "fast, step")) != name and fast in scenes
    ]
    return ["", f"With EXACT=1 a step takes {', '.join(told)}."] if told else []


def markdown(report: Report) -> str:
    """Write all figures as Markdown."""
    versions = cells(report, "environment").get("versions", {})
    command = "python3 run.py bench gpu" + " --tiny" * report["tiny"]
    lines = [f"# Engine on a GPU, {report['date']}", ""]
    lines.append(
        f"`{command}`; {versions.get('device', 'unknown device')}, Python "
        f"{versions.get('python', '?')}, torch {versions.get('torch', '?')}, transformers "
        f"{versions.get('transformers', '?')}, {versions.get('dtype', '?')}; random weights; load "
        f"{report['load']:.1f} at the start; {report.get('seconds', 0):.0f} s."
    )
    if not on_gpu(report):
        lines += ["", "**Not a GPU's figures**: they only show that the benchmark works."]
    lines += ["", "## Aims", "", "| | aim | here | |", "|---|---|---|---|"]
    lines += [
        f"| {aim['what']} | {aim['aim']} | {_short(aim['here'])} | {aim['said']} |"
        for aim in report.get("aims", [])
    ]
    lines += costs(report)
    for name, section in report["sections"].items():
        lines += ["", f"## {name} ({section['status']})", ""]
        lines += list(_steps(section["cells"]) if name in STEPS else _table(section["cells"]))
        if section["left_out"]:
            lines += ["", f"Left out: {', '.join(section['left_out'])}."]
    return "\n".join([*lines, ""])


def _steps(found: dict[str, Figures]) -> Iterator[str]:
    """Yield a table of decode steps: a row for each batch and context, a column for each stage."""
    places = list(dict.fromkeys(name.partition(" ")[2] for name in found))
    stages = list(dict.fromkeys(name.partition(" ")[0] for name in found))
    yield "ms per step (share of the floor; ms of the host); rows x tokens of context"
    yield ""
    yield f"| | floor | {' | '.join(stages)} |"
    yield "|---" * (len(stages) + 2) + "|"
    for place in places:
        row = [found.get(f"{stage} {place}", {}) for stage in stages]
        floors = [figures["floor_ms"] for figures in row if "floor_ms" in figures]
        yield (
            f"| {place} | {_short(max(floors, default=None))} | "
            + " | ".join(map(_step, row))
            + " |"
        )


def _step(figures: Figures) -> str:
    if "ms" not in figures:
        return str(figures.get("failed", ""))
    share, host = figures["floor_share"], figures["host_ms"]
    return f"{_short(figures['ms'])} ({share:.0%}; {_short(host)})"


def _table(found: dict[str, Figures]) -> Iterator[str]:
    """Yield a line for each cell."""
    yield "| | |"
    yield "|---|---|"
    for name, figures in found.items():
        told = ", ".join(
            f"{key.replace('_', ' ')} {_short(value)}"
            for key, value in figures.items()
            if key != "seconds"
        )
        yield f"| {name.replace('|', ', ')} | {told} |"


def _short(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return str(value)


def draw(report: Report, path: Path) -> None:
    """Draw the stages' shares of the floor; nothing where no step was measured.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    every = cells(report, "decode") | cells(report, "large-batch")
    steps = {
        name: figures for name, figures in every.items() if figures["stage"] == name.split()[0]
    }
    if not steps:
        return
    places = list(dict.fromkeys(name.partition(" ")[2] for name in steps))
    stages = list(dict.fromkeys(name.partition(" ")[0] for name in steps))
    figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
    width = 0.8 / len(stages)
    for number, stage in enumerate(stages):
        shares = [steps.get(f"{stage} {place}", {}).get("floor_share", 0) for place in places]
        spots = [at + number * width for at in range(len(places))]
        axis.bar(spots, [100 * share for share in shares], width, label=stage)
    axis.set(ylabel="% of the floor", title=f"Decode steps, {report['date']}")
    axis.set_xticks([at + 0.4 - width / 2 for at in range(len(places))], places)
    axis.set_xlabel("rows x tokens of context")
    axis.grid(axis="y", alpha=0.3)
    axis.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)
