"""What operators do: scale, roll, stop; under load, and nobody who streams notices."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest

from tests.compose.kit import ENDED_BY_ITSELF, Compose, Load, PlainStream, docker, say
from tests.stack import ROOT


def roll(compose: Compose, *service: str) -> str:
    done = subprocess.run(
        [ROOT / "deploy" / "roll", *service, *compose.options],
        cwd=ROOT,
        env=compose.env,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def scale(compose: Compose, service: str, count: int) -> None:
    argv = ["up", "--detach", "--wait", "--no-build", "--no-recreate", "--no-deps"]
    compose(*argv, f"--scale={service}={count}", service, seconds=400)


@contextlib.contextmanager
def autoscaled(compose: Compose, *argv: str) -> Iterator[None]:
    """Run `deploy/autoscale` until the end of the block."""
    program = [ROOT / "deploy" / "autoscale", f"--url={compose.url}", "--interval=1", *argv]
    process = subprocess.Popen([*program, "--", *compose.options], cwd=ROOT, env=compose.env)
    try:
        yield
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


@contextlib.contextmanager
def backlog(compose: Compose, sessions: int) -> Iterator[list[str]]:
    """Leave more work than the workers have room for, until the end of the block."""
    ids: list[str] = []
    try:
        for _ in range(sessions):
            stream = PlainStream(compose.url, tokens=3000).read(events=1)
            ids.append(stream.ids[0].partition(":")[0])
        yield ids
    finally:
        for session in ids:
            compose.cancel(session)


def served_by(compose: Compose) -> list[int]:
    """Return, for each gateway, how many ready workers it knows of; 0 if it does not say."""
    found = []
    for container in compose.containers("gateway"):
        command = ["docker", "exec", container, "python", "-m", "gateway.healthcheck", "--ready"]
        said = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout.split()
        found.append(int(said[1]) if said[:1] == ["ready:"] else 0)
    return found


def test_scaling_up_and_down_under_load(compose: Compose, expected) -> None:
    """New gateways and workers are used at once; those taken away are not missed.

    Workers are started since sessions wait, and stopped since none has for a while.
    """
    with Load(compose.url, expected, threads=4, whole=2) as load:
        load.wait_flowing()
        scale(compose, "gateway", 3)
        say("three gateways")
        load.wait(lambda: compose.gateways_in_use() == 3, "the proxy uses the third gateway")
        with (
            backlog(compose, sessions=12) as waiting,
            autoscaled(compose, "--per-worker=4", "--max=3"),
        ):
            say(f"{len(waiting)} more sessions")
            load.wait(lambda: compose.healthy("worker", 3), "a third worker")
            say("three workers")
            load.wait(lambda: served_by(compose) == [3, 3, 3], "three gateways see three workers")
        load.wait_flowing()
        with autoscaled(compose, "--patience=2"):
            load.wait(lambda: compose.healthy("worker", 1), "one worker")
        say("one worker")
        scale(compose, "gateway", 1)
        say("one gateway")
        load.wait(lambda: compose.gateways_in_use() == 1, "the proxy forgets two gateways")
        load.wait_flowing()
        scale(compose, "worker", 2)
        scale(compose, "gateway", 2)
        load.wait_flowing()
        say(f"two of each again; {load.finished} generations meanwhile, each whole")


def test_a_single_worker_is_replaced_without_a_break(compose: Compose, expected) -> None:
    """With `--start-first` nothing is refused: the new worker serves before the old one goes."""
    scale(compose, "worker", 1)
    before = compose.containers("worker")
    with Load(compose.url, expected, threads=3, whole=1, retries=0) as load:
        load.wait_flowing()
        roll(compose, "--start-first", "worker")
        load.wait_flowing()
    after = compose.containers("worker")
    assert len(after) == len(before) == 1
    assert after != before
    say(f"{load.finished} generations while the only worker was replaced, each whole")
    scale(compose, "worker", 2)


def test_a_rolling_restart_under_load_loses_nothing(compose: Compose, expected) -> None:
    """All gateways, then all workers are replaced; every stream of that time has its whole text."""
    before = {*compose.containers("gateway"), *compose.containers("worker")}
    with Load(compose.url, expected, threads=6, whole=2) as load:
        load.wait_flowing()
        roll(compose, "gateway")
        say("gateways replaced")
        load.wait_flowing()
        roll(compose, "worker")
        say("workers replaced")
        load.wait_flowing()
    after = {*compose.containers("gateway"), *compose.containers("worker")}
    assert len(after) == len(before)
    assert not before & after
    say(f"{load.finished} generations during the rolling restart, each whole")


def test_taking_it_down_ends_everything_in_time(compose: Compose) -> None:
    """`docker compose down` needs no SIGKILL: every program ends by itself."""
    compose("stop", "gateway")
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{compose.url}/v1/models", timeout=30)
    assert refused.value.code == 503
    assert json.load(refused.value)["error"]["code"] == "unavailable"
    assert refused.value.headers["retry-after"]
    compose("start", "gateway")
    names = [c for s in ("proxy", "gateway", "worker", "redis") for c in compose.containers(s)]
    compose("stop")
    codes = {c: docker("inspect", "--format={{.Name}} {{.State.ExitCode}}", c) for c in names}
    assert all(code.split()[1] in ENDED_BY_ITSELF for code in codes.values()), codes
    compose("down")
    assert not compose.containers("gateway")
