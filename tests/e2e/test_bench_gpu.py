from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from benchmarks.gpu import SHARES
from tests.stack import ROOT, wait_until

pytestmark = pytest.mark.timeout(360)

ABSENT = ("msgspec", "llguidance", "redis", "arq", "hiredis", "pydantic_settings", "fastapi")
"""Packages that a GPU machine with PyTorch and Transformers need not have."""


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> dict[str, str]:
    """An environment in which those packages cannot be imported."""
    folder = tmp_path_factory.mktemp("absent")
    for name in ABSENT:
        (folder / f"{name}.py").write_text("raise ImportError('not on this machine')\n")
    return {**os.environ, "PYTHONPATH": str(folder)}


def command(folder: Path, *more: str) -> list[str]:
    bench = [sys.executable, "-m", "benchmarks.gpu", "--tiny", "--out", str(folder / "gpu")]
    return [*bench, "--minutes", "5", *more]  # a minute does, on a machine with nothing else to do


def read(folder: Path) -> dict:
    path = folder / "gpu.json"
    return json.loads(path.read_text()) if path.exists() else {"sections": {}}


def status(folder: Path, section: str) -> str:
    return read(folder)["sections"].get(section, {}).get("status", "")


@pytest.fixture(scope="module")
def whole(bare, tmp_path_factory) -> tuple[subprocess.CompletedProcess, dict, str]:
    """A run of all sections: how it ended, its JSON, its text."""
    folder = tmp_path_factory.mktemp("gpu")
    argv = [sys.executable, "run.py", "bench", "--no-install", "gpu", *command(folder)[3:]]
    done = subprocess.run(argv, cwd=ROOT, env=bare, capture_output=True, text=True, timeout=330)
    return done, read(folder), (folder / "gpu.md").read_text()


def test_all_sections_run_on_a_cpu_with_little_installed(whole):
    """With a tiny model all sections have all their figures, without our other packages."""
    done, report, text = whole
    assert done.returncode == 0, done.stderr[-3000:]
    assert report["complete"]
    for name in SHARES:
        section = report["sections"][name]
        assert (section["status"], section["left_out"]) == ("done", []), name
        assert section["cells"], name
        assert not {c: f for c, f in section["cells"].items() if "failed" in f}, name
    assert len(report["sections"]["decode"]["cells"]) == 2 * (4 * 2 + 2)
    assert len(report["sections"]["large-batch"]["cells"]) == 4 * 2 + 2
    assert "With EXACT=1 a step takes" in text


def test_figures_are_measured(whole):
    """A step's time fits in what its measuring took, and rate and floor follow from it."""
    _, report, _ = whole
    cells = {name: section["cells"] for name, section in report["sections"].items()}
    bandwidth = cells["environment"]["copy"]["bytes_per_s"]
    model = cells["environment"]["model"]
    steps = 6
    found = {**cells["decode"], **cells["large-batch"]}
    for name, step in found.items():
        assert 0 < steps * step["ms"] / 1000 < step["seconds"], name
        read = model["step_bytes"] + step["batch"] * (step["context"] - 6) * model["token_bytes"]
        assert step["floor_ms"] == pytest.approx(read / bandwidth * 1000), name
        assert step["floor_share"] == pytest.approx(step["floor_ms"] / step["ms"]), name
        assert step["tokens_per_s"] == pytest.approx(step["batch"] / step["ms"] * 1000), name
    assert len({step["ms"] for step in found.values()}) == len(found)
    for name, run in (*cells["requests"].items(), *cells["requests-compiled"].items()):
        if "tokens" in run:
            assert run["tokens"] == run["expected_tokens"], name
            assert run["tokens_per_s"] == pytest.approx(run["tokens"] / run["seconds_of_work"])
            assert run["seconds_of_work"] < run["seconds"]


def test_what_is_right_is_judged_and_speed_is_not(whole):
    """On a CPU the checks have their verdict; the aims of speed are not run, and it says so."""
    _, report, text = whole
    said = [aim["said"] for aim in report["aims"]]
    assert said == ["not run"] * 5 + ["reached"] * 2
    assert "Not a GPU's figures" in text
    exact = {
        name: cell["equal"]
        for name, cell in report["sections"]["determinism"]["cells"].items()
        if name.startswith("exact") and "equal" in cell
    }
    assert len(exact) == 6  # on a CPU too, where rows are decoded one by one for it
    assert all(equal for name, equal in exact.items() if "prefilled" not in name)


def test_a_killed_run_leaves_what_it_has_measured(bare, tmp_path):
    """After SIGKILL the JSON is whole, with the sections so far; no process stays behind."""
    argv = command(tmp_path, "--sections", "environment", "correctness", "prefill")
    run = psutil.Popen(argv, cwd=ROOT, env=bare, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: status(tmp_path, "correctness") == "running", "one section is done", 60)
        children = run.children(recursive=True)
    finally:
        run.send_signal(signal.SIGKILL)
        run.wait()
    report = read(tmp_path)
    assert report["sections"]["environment"]["status"] == "done"
    assert report["sections"]["environment"]["cells"]["copy"]["bytes_per_s"] > 0
    assert report["sections"]["prefill"]["status"] == "not run"
    assert not report["complete"]
    assert children
    wait_until(lambda: not any(c.is_running() for c in children), "its process ends", 60)


def test_a_lost_device_costs_its_section_alone(bare, tmp_path):
    """When the measuring process dies before it said a word, another one takes the next section."""
    argv = command(tmp_path, "--sections", "environment", "prefill")
    run = psutil.Popen(argv, cwd=ROOT, env=bare, stderr=subprocess.DEVNULL)
    try:
        wait_until(run.children, "a process measures", 30)
        run.children()[0].kill()
        assert run.wait(120) == 1
    finally:
        if run.is_running():
            run.kill()
            run.wait()
    sections = read(tmp_path)["sections"]
    assert sections["environment"]["status"] == "failed: its process ended with -9"
    assert sections["prefill"]["status"] == "done"
    assert all("ms" in figures for figures in sections["prefill"]["cells"].values())
