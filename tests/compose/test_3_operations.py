"""What operators do: scale, roll, stop; under load, and nobody who streams notices."""

from __future__ import annotations

import contextlib
import signal
import subprocess
from collections.abc import Iterator

from tests.compose.kit import ENDED_BY_ITSELF, Compose, Load, docker
from tests.stack import ROOT, wait_until


def roll(compose: Compose, service: str) -> str:
    options = compose.options
    done = subprocess.run(
        [ROOT / "deploy" / "roll", service, *options],
        cwd=ROOT,
        env=compose.env,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def scale(compose: Compose, service: str, count: int) -> None:
    argv = ["up", "--detach", "--wait", "--no-build", "--no-recreate", "--no-deps"]
    compose(*argv, f"--scale={service}={count}", service, seconds=240)


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


def served_by(compose: Compose) -> dict[str, int]:
    """Return, for each gateway, how many ready workers it knows of."""
    found = {}
    for container in compose.containers("gateway"):
        said = docker("exec", container, "python", "-m", "gateway.healthcheck", "--ready")
        found[container] = int(said.split()[1])
    return found


def test_scaling_up_and_down_under_load(compose: Compose, expected) -> None:
    """New gateways and workers are used at once; those taken away are not missed."""
    with Load(compose.url, expected, threads=6) as load:
        load.wait_flowing()
        scale(compose, "gateway", 3)
        with autoscaled(compose, "--min=3"):
            compose.wait_healthy("worker", 3)
        wait_until(
            lambda: set(served_by(compose).values()) == {3}, "three gateways see three workers"
        )
        wait_until(lambda: len(connections(compose)) == 3, "the proxy uses the third gateway", 120)
        load.wait_flowing()
        with autoscaled(compose, "--min=1", "--patience=0"):
            compose.wait_healthy("worker", 1)
        scale(compose, "gateway", 1)
        load.wait_flowing()
        scale(compose, "worker", 2)
        scale(compose, "gateway", 2)
        load.wait_flowing()
    assert load.finished


def connections(compose: Compose) -> set[str]:
    """Return the gateways that hold an established connection on their port now."""
    busy = set()
    for container in compose.containers("gateway"):
        table = docker("exec", container, "cat", "/proc/net/tcp").splitlines()[1:]
        rows = [line.split() for line in table]
        local = [row for row in rows if row[1].endswith(":0BB8") and row[3] == "01"]
        if local:
            busy.add(container)
    return busy


def test_a_rolling_restart_under_load_loses_nothing(compose: Compose, expected) -> None:
    """All gateways, then all workers are replaced; every stream of that time has its whole text."""
    before = {*compose.containers("gateway"), *compose.containers("worker")}
    with Load(compose.url, expected, threads=6) as load:
        load.wait_flowing()
        roll(compose, "gateway")
        load.wait_flowing()
        roll(compose, "worker")
        load.wait_flowing()
    after = {*compose.containers("gateway"), *compose.containers("worker")}
    assert len(after) == 4
    assert not before & after
    print(f"\n{load.finished} streams during the rolling restart, each whole")


def test_taking_it_down_ends_everything_in_time(compose: Compose) -> None:
    """`docker compose down` needs no SIGKILL: every program ends by itself."""
    names = [c for s in ("proxy", "gateway", "worker", "redis") for c in compose.containers(s)]
    compose("stop")
    codes = {c: docker("inspect", "--format={{.Name}} {{.State.ExitCode}}", c) for c in names}
    assert all(code.split()[1] in ENDED_BY_ITSELF for code in codes.values()), codes
    compose("down")
    assert not compose.containers("gateway")
