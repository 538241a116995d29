"""A short run of `run.py chaos`: all is killed, and no token is lost, repeated or changed."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.stack import ROOT, clean_environment

SECONDS = 20
SMALL = ["--clients=8", "--cases=8", "--tokens=120", "--gateways=2", "--workers=2", "--pace=30"]


@pytest.mark.timeout(400)  # a stack, and what it makes of a busy machine
def test_nothing_is_lost_whatever_is_killed(demo_model):
    """Eight clients stream through twenty seconds of faults, and read the undisturbed texts."""
    argv = [sys.executable, "run.py", "chaos", "--no-install", f"--seconds={SECONDS}", *SMALL]
    ran = subprocess.run(argv, cwd=ROOT, env=clean_environment(), capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    figures = json.loads((ROOT / ".cache" / "chaos.json").read_text())
    lost = [figures[f"tokens_{how}"] for how in ("lost", "repeated", "changed")]
    assert lost == [0, 0, 0]
    assert figures["without_exactly_one_end"] == 0
    assert figures["streams_hit"] > 0
    assert figures["streams"] >= 8
    assert sum(figures["faults"].values()) >= SECONDS // 2
