"""How many workers `deploy/autoscale` wants."""

from __future__ import annotations

import argparse
import importlib.machinery
import importlib.util
from pathlib import Path

import pytest

PATH = Path(__file__).resolve().parents[2] / "deploy" / "autoscale"
ARGS = argparse.Namespace(min=1, max=4, per_worker=32, patience=300)


@pytest.fixture(scope="module")
def autoscale():
    loader = importlib.machinery.SourceFileLoader("autoscale", str(PATH))
    spec = importlib.util.spec_from_loader("autoscale", loader)
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("running", "waiting", "idle", "goal"),
    [
        (1, 0, 0, 1),
        (1, 1, 0, 2),
        (1, 33, 0, 3),
        (2, 1000, 0, 4),
        (3, 0, 299, 3),
        (3, 0, 300, 2),
        (1, 0, 900, 1),
        (0, 0, 0, 1),
        (0, None, 900, 1),
        (3, None, 900, 3),
        (6, 0, 0, 4),
    ],
)
def test_the_goal(autoscale, running: int, waiting: int | None, idle: float, goal: int) -> None:
    """More for those that wait, one fewer after a quiet time, never beyond the bounds."""
    assert autoscale.wanted(running, waiting, idle, ARGS) == goal
