"""The figures of a chaos run: as a table for people, and as JSON."""

from __future__ import annotations

import dataclasses
import datetime as dt
import json
import os
import platform
import time
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from benchmarks._chaos_stack import ROOT
from benchmarks._chaos_verdict import (
    BOUNDS,
    UNBEGUN,
    WINDOW,
    Judgement,
    Log,
    Silence,
    count_kinds,
    given_back,
    percentile,
    resumed_after,
    silences,
    start_seconds,
    takeovers,
)

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from benchmarks._chaos_clients import Stream
    from benchmarks._chaos_faults import Fault
    from benchmarks._chaos_load import Load

RESULTS = ROOT / "benchmarks" / "results"
BROKEN = (
    "tokens_lost",
    "tokens_repeated",
    "tokens_changed",
    "without_exactly_one_end",
    "otherwise_wrong",
)
"""The figures that must be 0."""

RECONNECTING = ("gateway SIGKILL", "gateway SIGTERM", "client cut")
"""Faults after which clients open new connections."""

TABLE = """| longest silence of streams hit by | streams | p50 / p99, s | less the absence | aim | |
|---|---|---|---|---|---|"""


@dataclass
class Run:
    """What a run has left: streams, their logs and judgements, faults, workers' logs, the load."""

    streams: Sequence[Stream]
    logs: dict[str, Log]
    judged: Sequence[Judgement]
    faults: Sequence[Fault]
    worker_logs: Sequence[dict[str, Any]]
    seconds: float
    load: Load


def figures(run: Run, args: argparse.Namespace) -> dict[str, Any]:
    """Count everything."""
    streams, logs = run.streams, run.logs
    given = given_back(run.worker_logs, time.time() - time.monotonic())
    found, unexplained = silences(streams, run.faults, given)
    dropped = [line for line in run.worker_logs if line.get("message") == "session dropped"]
    return {
        "streams": len(streams),
        "tokens": sum(len(ids) for log in logs.values() for ids in log.tokens().values()),
        "seconds": round(run.seconds, 1),
        "faults": count_kinds(run.faults),
        "longest_pause_between_faults": round(
            max((b.at - a.at for a, b in pairwise(run.faults)), default=0.0), 2
        ),
        "streams_hit": len({id(s) for fault in run.faults for s in fault.hit}),
        "cuts": sum(stream.cuts for stream in streams),
        "tokens_lost": sum(j.lost for j in run.judged),
        "tokens_repeated": sum(j.repeated for j in run.judged),
        "tokens_changed": sum(j.changed for j in run.judged),
        "without_exactly_one_end": sum(
            (s.finishes, s.dones) != (1, 1) or not logs[s.session_id].is_sound for s in streams
        ),
        "otherwise_wrong": sum(bool(j.notes) for j in run.judged),
        "takeovers": dataclasses.asdict(takeovers(run.worker_logs, logs, streams)),
        "dropped_by_old_workers": len(dropped),
        "silence": _silence_table(found),
        "other_silence": _percentiles(unexplained),
        "resume_accepted_after": {
            kind: _percentiles(seconds)
            for kind, seconds in resumed_after(run.faults).items()
            if kind in RECONNECTING
        },
        "worker_starts": _percentiles(start_seconds(run.worker_logs)),
        "machine_busy": round(run.load.busy, 2),
        "timer_lag_ms": [round(1e3 * percentile(run.load.lags, q), 1) for q in (0.5, 0.99, 1)],
        "load_average": round(os.getloadavg()[0], 1),
        "arguments": {k: v for k, v in vars(args).items() if k != "save"},
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, "
        f"Python {platform.python_version()}",
    }


def is_kept(found: dict[str, Any]) -> bool:
    """Whether every promise was kept; silences are figures, not promises."""
    return not any(found[name] for name in BROKEN)


def write(found: dict[str, Any], *, save: bool) -> None:
    """Print the figures, and write them as JSON; with `save`, as both under `results/`."""
    text = markdown(found)
    print(text)
    folder = RESULTS if save else ROOT / ".cache"
    folder.mkdir(exist_ok=True)
    name = f"chaos-{dt.datetime.now(dt.timezone.utc).date()}" if save else "chaos"
    (folder / f"{name}.json").write_text(json.dumps(found, indent=2) + "\n")
    if save:
        (folder / f"{name}.md").write_text(f"# Kill anything\n\n{text}\n")
    print(f"\nfigures: {folder / name}.json")


def markdown(found: dict[str, Any]) -> str:
    """Write the figures as Markdown."""
    hits = ", ".join(f"{count} {name}" for name, count in found["faults"].items())
    taken = found["takeovers"]
    asked = " ".join(f"--{name} {value}" for name, value in found["arguments"].items())
    rows = [_row(name, figures) for name, figures in found["silence"].items()]
    p50, p99 = found["other_silence"]
    return f"""\
`python3 run.py chaos {asked}`
{found["machine"]}; load average at the end {found["load_average"]}

{found["streams"]} streams, {found["tokens"]} tokens, {found["seconds"]} s.
Faults: {hits}; at most {found["longest_pause_between_faults"]} s apart; they hit \
{found["streams_hit"]} of the streams.

Tokens lost, repeated, changed: **{found["tokens_lost"]}, {found["tokens_repeated"]}, \
{found["tokens_changed"]}**.
Streams without exactly one end: **{found["without_exactly_one_end"]}**; otherwise wrong: \
**{found["otherwise_wrong"]}**.

Writer switches: {taken["switches"]} in {taken["sessions"]} sessions. Prefilled again: \
{taken["prefilled_again"]} tokens. Logs that began again further back: {taken["rewound"]}. \
Sessions dropped by workers that woke: {found["dropped_by_old_workers"]}.

{TABLE}
{chr(10).join(rows)}
| none of these | {found["streams"]} | {p50} / {p99} | | | |

{_machine(found)}"""


def _machine(found: dict[str, Any]) -> str:
    """Say what of the silences is the machine's, and no fault's."""
    accepted = found["resume_accepted_after"].items()
    resumes = ", ".join(f"{kind} {p50} / {p99}" for kind, (p50, p99) in accepted)
    pace, lag, starts = found["arguments"]["pace"], found["timer_lag_ms"], found["worker_starts"]
    return f"""\
Streams are paced at {pace:g} tokens a second (0: not at all), so that the faults are measured and \
not the load; their pauses are {1 / pace if pace else 0:.2f} s without any fault. A silence is a \
stream's longest pause that was under way at the fault, or at its hand-over by a worker that \
stops, or began within {WINDOW:g} s of it; it counts from the fault, or from the last event where \
that came later, also while the first token is waited for. The machine was \
{found["machine_busy"]:.0%} busy: a timer of the clients' process was late by {lag[0]} / {lag[1]} \
/ {lag[2]} ms (p50 / p99 / longest), and a worker took {starts[0]} / {starts[1]} s to start. A new \
connection was accepted after (p50 / p99, s): {resumes}."""


def _row(name: str, figures: dict[str, Any]) -> str:
    seconds, beyond = figures["seconds"], figures["less_absence"]
    bound = "sum of theirs" if figures["bound"] is None else f"{figures['bound']:g}"
    cells = [name, figures["streams"], f"{seconds[0]} / {seconds[1]}"]
    cells += [f"{beyond[0]} / {beyond[1]}", bound, "reached" if figures["reached"] else "missed"]
    if name == UNBEGUN:  # how long a prompt takes is no aim of this run
        cells[-2:] = ["", ""]
    return f"| {' | '.join(map(str, cells))} |"


def _silence_table(found: Sequence[Silence]) -> dict[str, dict[str, Any]]:
    """Return, per kind of fault, the silences against what is aimed at."""
    table: dict[str, dict[str, Any]] = {}
    for name in [*BOUNDS, "several at once", UNBEGUN]:
        of_kind = [s for s in found if s.kind == name]
        late = sum(s.beyond > s.bound for s in of_kind)
        if of_kind:
            table[name] = {
                "streams": len(of_kind),
                "seconds": _percentiles([s.seconds for s in of_kind]),
                "less_absence": _percentiles([s.beyond for s in of_kind]),
                "bound": BOUNDS.get(name),
                "beyond_bound": late,
                "reached": late <= len(of_kind) * 0.01,
            }
    return table


def _percentiles(values: Sequence[float]) -> list[float]:
    return [round(percentile(values, share), 2) for share in (0.5, 0.99)]
