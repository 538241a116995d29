from __future__ import annotations

import argparse
import copy
import subprocess
import sys

import pytest

from benchmarks import gpu
from benchmarks._gpu_report import aims, cells, draw, markdown
from tests.stack import ROOT

STEP = {"stage": "compiled", "ms": 2.0, "host_ms": 0.5, "floor_ms": 1.2, "floor_share": 0.6}
GOOD = {
    "date": "2026-01-01",
    "tiny": False,
    "load": 0.0,
    "sections": {
        "environment": {
            "status": "done",
            "left_out": [],
            "cells": {"versions": {"cuda": "13.0", "device": "a GPU"}},
        },
        "correctness": {
            "status": "done",
            "left_out": [],
            "cells": {"attention flash": {"passed": True}, "attention flex": {"left_out": "no"}},
        },
        "decode": {
            "status": "cut",
            "left_out": ["compiled 256 x 4096"],
            "cells": {
                "graph 1 x 1024": STEP | {"stage": "graph", "ms": 3.0},
                "compiled 1 x 1024": {**STEP},
                "compiled 64 x 1024": {**STEP},
                "drawn 1 x 1024": {**STEP},
                "eager 256 x 4096": {"failed": "OutOfMemoryError: none"},
            },
        },
        "generate": {"status": "done", "left_out": [], "cells": {"dynamic cache, 1": {"ms": 20.0}}},
        "determinism": {
            "status": "done",
            "left_out": [],
            "cells": {
                "exact, alone in the last row": {"equal": True},
                "exact, prefilled with its answer": {"equal": False},
            },
        },
    },
}


def said(report) -> list[str]:
    return [aim["said"] for aim in aims(report)]


@pytest.fixture
def report():
    return copy.deepcopy(GOOD)


def test_aims_that_are_reached(report):
    """Figures beyond the aims reach them; a prefill of the answer need not be bit-equal."""
    assert said(report) == ["reached"] * 7


@pytest.mark.parametrize(
    ("section", "cell", "figures", "place", "verdict"),
    [
        ("decode", "compiled 1 x 1024", {"floor_share": 0.34}, 0, "missed"),
        ("decode", "compiled 64 x 1024", {"floor_share": 0.54}, 1, "missed"),
        ("generate", "dynamic cache, 1", {"ms": 15.9}, 2, "missed"),
        ("decode", "graph 1 x 1024", {"ms": 1.9}, 3, "missed"),
        ("decode", "compiled 64 x 1024", {"host_ms": 2.0}, 4, "missed"),
        ("correctness", "attention flash", {"passed": False}, 5, "WRONG"),
        ("determinism", "exact, alone in the last row", {"equal": False}, 6, "WRONG"),
    ],
)
def test_each_aim_can_be_missed(report, section, cell, figures, place, verdict):
    """Each verdict follows its figure, and no other does."""
    report["sections"][section]["cells"][cell].update(figures)
    found = said(report)
    assert found[place] == verdict
    assert found[:place] + found[place + 1 :] == ["reached"] * 6


def test_a_check_that_fails_to_run_is_wrong(report):
    """A check that raised is no check that passed."""
    report["sections"]["correctness"]["cells"]["greedy, eager"] = {"failed": "RuntimeError: x"}
    assert said(report)[5] == "WRONG"


def test_what_did_not_run_is_said_so(report):
    """Without figures, and with those of a CPU or of the tiny model, no aim of speed is judged."""
    assert said({**report, "tiny": True}) == ["not run"] * 5 + ["reached"] * 2
    report["sections"]["environment"]["cells"]["versions"]["cuda"] = None
    assert said(report)[:5] == ["not run"] * 5
    empty = {"sections": {}, "tiny": False}
    assert said(empty) == ["not run"] * 7


def test_the_text_names_what_is_missing(report, tmp_path):
    """Text and chart come of any report: what failed and what was left out stand in it."""
    report["aims"] = aims(report)
    text = markdown(report)
    assert "Left out: compiled 256 x 4096." in text
    assert "OutOfMemoryError" in text
    assert "| 1 x 1024 | 1.2 |" in text
    assert "2 (60%; 0.5)" in text
    assert "Not a GPU's figures" not in text
    assert cells(report, "decode").keys() == GOOD["sections"]["decode"]["cells"].keys() - {
        "eager 256 x 4096"
    }
    draw(report, tmp_path / "chart.png")
    assert (tmp_path / "chart.png").stat().st_size > 0


DYING = """
import json, sys
job = json.loads(sys.argv[1])
for number, (name, _) in enumerate(job["sections"]):
    print(json.dumps({"section": name, "event": "begin", "seconds": 9}), flush=True)
    for cell in ("a", "b", "c"):
        if number == 0 and cell in job["skip"]:
            continue
        print(json.dumps({"section": name, "event": "cell", "cell": cell}), flush=True)
        if (name, cell) == ("decode", "b"):
            sys.exit(3)
        print(json.dumps({"section": name, "cell": cell, "figures": {}}), flush=True)
    print(json.dumps({"section": name, "event": "end", "left_out": []}), flush=True)
"""


def begin(child: list[str], minutes: float = 1.0) -> gpu.Run:
    args = argparse.Namespace(
        minutes=minutes, tiny=True, out=None, sections=["environment", "decode", "static"]
    )
    return gpu.Run(args, child)


def test_a_process_that_dies_costs_one_figure():
    """The next process goes on behind the figure that the last one died of."""
    run = begin([sys.executable, "-c", DYING])
    run.measure()
    sections = run.report["sections"]
    assert [list(section["cells"]) for section in sections.values()] == [["a", "b", "c"]] * 3
    assert sections["decode"]["cells"]["b"] == {"failed": "its process ended with 3"}
    assert {section["status"] for section in sections.values()} == {"done"}
    assert (run.report["complete"], run.report["deaths"], run.well) == (True, 1, False)


STUBBORN = """
import json, sys
job = json.loads(sys.argv[1])
for number, (name, _) in enumerate(job["sections"]):
    print(json.dumps({"section": name, "event": "begin", "seconds": 9}), flush=True)
    for cell in ("graph 1", "graph 2", "drawn 1"):
        if number == 0 and (cell in job["skip"] or cell.split()[0] in job["lost"]):
            continue
        print(json.dumps({"section": name, "event": "cell", "cell": cell}), flush=True)
        lost = name == "decode" and cell != "drawn 1"
        figures = {"failed": "AcceleratorError: x"} if lost else {}
        print(json.dumps({"section": name, "cell": cell, "figures": figures}), flush=True)
        if lost:
            sys.exit(3)
    print(json.dumps({"section": name, "event": "end", "left_out": []}), flush=True)
"""


def test_a_way_to_decode_that_loses_the_device_is_tried_once():
    """Others of its kind would take a process each; those of other kinds are measured."""
    run = begin([sys.executable, "-c", STUBBORN])
    run.measure()
    assert list(run.report["sections"]["decode"]["cells"]) == ["graph 1", "drawn 1"]
    assert list(run.report["sections"]["static"]["cells"]) == ["graph 1", "graph 2", "drawn 1"]
    assert run.report["deaths"] == 1


def test_a_process_that_never_begins_is_not_tried_for_ever():
    """Each section is given up whose process says nothing; without a GPU, all are at once."""
    run = begin([sys.executable, "-c", "import sys; sys.exit(1)"])
    run.measure()
    assert run.report["deaths"] == 3
    assert {s["status"] for s in run.report["sections"].values()} == {
        "failed: its process ended with 1"
    }
    none = begin([sys.executable, "-c", f"import sys; sys.exit({gpu.NO_GPU})"])
    none.measure()
    assert (none.report["deaths"], none.report["complete"]) == (1, False)


def test_a_section_that_hangs_is_cut():
    """A process that says nothing until its time is up is given up, with what was under way."""
    run = begin([], minutes=0.005)
    run.report["sections"]["environment"]["cell"] = "copy"
    with subprocess.Popen(["sleep", "60"], stdout=subprocess.PIPE, text=True) as hung:
        assert run._follow(hung, ["environment", "static"]) == ["static"]
        hung.kill()
    section = run.report["sections"]["environment"]
    assert (section["status"], section["left_out"]) == ("cut", ["copy"])


def test_it_starts_without_packages():
    """The process that keeps the time and the results needs Python alone."""
    argv = [sys.executable, "-S", "-c", "import benchmarks.gpu"]
    assert subprocess.run(argv, cwd=ROOT, timeout=30).returncode == 0
