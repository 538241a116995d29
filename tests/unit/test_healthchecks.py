"""The commands that containers are asked how they are with."""

from __future__ import annotations

import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from gateway import healthcheck as of_gateway
from shared import hung
from shared.settings import WorkerSettings
from tests.stack import ROOT
from worker import healthcheck as of_worker
from worker.main import WorkerProcess

READY = {"status": "ready", "models": ["demo"], "workers": 2, "queue_depth": 3}
NOT_READY = {"error": {"message": "The model is not ready yet: downloading 1.00 of 4.00 GB 25%."}}


@pytest.fixture
def server():
    """A server that gives the answers put into its `answers`."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if not answers[self.path]:
                over.wait()  # it hangs
                return
            status, body = answers[self.path]
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body if isinstance(body, bytes) else json.dumps(body).encode())

        def log_message(self, *args):
            pass

    over = threading.Event()
    answers = {"/health": (200, {"status": "ok"}), "/ready": (200, READY)}
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.answers = answers
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield running
        over.set()
        running.shutdown()
        thread.join()


def address(server):
    return f"127.0.0.1:{server.server_address[1]}"


def test_a_gateway_that_serves_is_ready(server):
    """It says how many workers serve and how many sessions wait."""
    code, sentence = of_gateway.check(address(server), need_ready=True)
    assert (code, sentence) == (0, "ready: 2 workers, 3 sessions wait")


def test_a_gateway_without_a_model_lives(server):
    """It is healthy and starting, with the phase; not so for who needs it ready."""
    server.answers["/ready"] = (503, NOT_READY)
    code, sentence = of_gateway.check(address(server))
    assert (code, sentence.partition(":")[0]) == (0, "starting")
    assert "downloading 1.00 of 4.00 GB" in sentence
    assert of_gateway.check(address(server), need_ready=True)[0] == 1


@pytest.mark.parametrize("body", [b"<html>", b"[]", b"{}"])
def test_something_else_on_the_port_is_no_gateway(server, body):
    """Another server's 200 is no health."""
    server.answers["/health"] = (200, body)
    code, sentence = of_gateway.check(address(server))
    assert (code, sentence.partition(":")[0]) == (1, "broken")


def test_a_gateway_whose_redis_hangs_lives(server, monkeypatch):
    """That `/ready` takes long is no reason to give it up."""
    monkeypatch.setattr(of_gateway, "TIMEOUT_SECONDS", 0.2)
    server.answers["/ready"] = None  # for ever
    assert of_gateway.check(address(server)) == (0, "starting: Redis takes its time.")


def test_a_gateway_that_hangs_is_killed_with_the_third_strike(server, monkeypatch, tmp_path):
    """A good check in between begins the count anew; without the option nothing is killed."""
    monkeypatch.setattr(of_gateway, "TIMEOUT_SECONDS", 0.2)
    monkeypatch.setattr(of_gateway, "STRIKES_FILE", tmp_path / "strikes")
    monkeypatch.setattr(hung, "INIT", os.getpid())
    (tmp_path / "gateway").mkdir()
    (tmp_path / "gateway" / "main.py").write_text("import time; time.sleep(60)")
    argv = [sys.executable, "-m", "gateway.main"]
    good = {**server.answers}
    with subprocess.Popen(argv, cwd=tmp_path) as program:

        def check(*options: str, answers: bool = False) -> int | None:
            server.answers["/health"] = good["/health"] if answers else None
            of_gateway.main([address(server), *options])
            return program.poll()

        try:
            for _ in range(hung.STRIKES + 1):
                assert check() is None
            for answers in (False, False, True, False, False):
                assert check("--end-hung", answers=answers) is None
            check("--end-hung")
            assert program.wait(10) == -signal.SIGKILL
        finally:
            program.kill()


def test_a_dead_gateway_is_broken():
    """The command ends with 1 where nobody listens; it needs no package."""
    argv = [sys.executable, "-S", "-m", "gateway.healthcheck", "127.0.0.1:1"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.partition(":")[0]) == (1, "broken")


@pytest.mark.parametrize(
    ("state", "reason", "code", "sentence"),
    [
        ("ready", "", 0, "ready: demo, 3 of 32 slots in use"),
        ("draining", "", 0, "draining: 3 of 32 slots in use"),
        (
            "loading",
            "downloading 1.20 of 4.26 GB 28%",
            1,
            "starting: downloading 1.20 of 4.26 GB 28%",
        ),
        ("failed", "There is no model.", 1, "broken: There is no model."),
    ],
)
def test_a_workers_states(tmp_path: Path, state: str, reason: str, code: int, sentence: str):
    """Ready and draining are healthy; starting and broken come with the phase or the reason."""
    file = tmp_path / "worker.json"
    of_worker.write(file, state=state, reason=reason, model="demo", running=3, slots=32)
    assert of_worker.check(file, time.time()) == (code, sentence)
    late, why = of_worker.check(file, time.time() + 2 * of_worker.STALE_SECONDS)
    assert (late, why.startswith(of_worker.HANGS)) == (1, True)


def test_a_worker_that_has_said_nothing(tmp_path: Path):
    """No file means that it starts; one that is no status, that it is broken."""
    argv = [sys.executable, "-S", "-m", "worker.healthcheck", str(tmp_path / "none")]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.partition(":")[0]) == (1, "starting")
    (tmp_path / "x").write_text("{")
    assert of_worker.check(tmp_path / "x", 0)[1].startswith("broken")


def test_a_full_disk_does_not_stop_the_worker(tmp_path: Path):
    """What cannot be written is left unsaid."""
    of_worker.write(tmp_path / "no" / "x", state="ready", reason="", model="", running=0, slots=1)


async def test_a_worker_writes_its_state_without_redis(tmp_path: Path):
    """The file tells of a worker's start though Redis does not answer."""
    file = tmp_path / "worker.json"
    settings = WorkerSettings(redis_url="redis://127.0.0.1:1/0", status_file=str(file))
    process = WorkerProcess(settings)
    process._write_status(process._info())
    code, sentence = of_worker.check(file, time.time())
    assert (code, sentence) == (1, "starting: starting the engine")
