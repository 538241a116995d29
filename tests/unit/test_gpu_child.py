"""The process that measures for the GPU benchmark keeps to its time, whatever its cells do."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import _gpu_child
from benchmarks._gpu_bench import READY

SECONDS = 10.0
CELLS = {"a": 4.0, f"exact, {READY}": 60.0, "exact, b": 9.0, "graph 1": 2.0, "graph 2": 1.0}
"""How long each takes."""


@pytest.fixture
def told(monkeypatch):
    """Runs a section of those cells by a clock of its own; returns what it says."""

    def run(cells: dict[str, float], **asked: list[str]) -> list[dict[str, Any]]:
        now, lines = [100.0], list[dict[str, Any]]()

        def measure(cell: str) -> dict[str, Any]:
            now[0] += cells[cell]
            return {}

        def section(_bench):
            yield from ((cell, lambda cell=cell: measure(cell)) for cell in cells)

        reporter = SimpleNamespace(say=lambda section, **told: lines.append(told))
        monkeypatch.setattr(_gpu_child, "time", SimpleNamespace(monotonic=lambda: now[0]))
        monkeypatch.setitem(_gpu_child.SECTIONS, "decode", section)
        options = {"skip": [], "lost": [], **asked}
        _gpu_child.run_section(reporter, "decode", SimpleNamespace(until=0.0), SECONDS, **options)
        return lines

    return run


def measured(lines):
    return [line["cell"] for line in lines if "figures" in line]


def test_a_section_begins_anew_when_it_is_ready(told):
    """What a compiler takes is not taken from the figures; whoever keeps the time hears of it."""
    lines = told(CELLS)
    assert measured(lines) == [*CELLS][:4]
    assert lines[-1] == {"event": "end", "left_out": ["graph 2"]}
    assert [line["seconds"] for line in lines if line.get("event") == "begin"] == [SECONDS] * 2


def test_what_does_not_fit_is_left_out(told):
    """Any other cell takes its time from those behind it."""
    lines = told({"a": 11.0, "b": 1.0})
    assert measured(lines) == ["a"]
    assert lines[-1]["left_out"] == ["b"]


def test_kinds_of_cells_that_a_process_died_of_are_left_out(told):
    """Those that were tried are not told of again, and their like are not tried."""
    lines = told(CELLS, skip=["a", "graph 1"], lost=["graph"])
    assert measured(lines) == [f"exact, {READY}", "exact, b"]
    assert lines[-1]["left_out"] == ["graph 2"]
