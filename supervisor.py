"""Watches the programs of a stack on one machine: starts them again, and leaves none behind.

It belongs to `run.py`, and like it needs nothing but Python.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from pathlib import Path

TICK = 0.1  # seconds between two looks at the parts
TRIES = 2  # starts before the stack is ready: what cannot start fails the same way each time
SHORT_LIFE = 10.0  # seconds; who dies younger waits longer for the next start
GRACE = 8.0  # seconds from SIGTERM to SIGKILL, beside the time that a part may drain
LOCK_PATIENCE = 3.0  # seconds that the guard of a killed run.py gets to clear up

# A process that outlives a killed run.py, and then kills the process groups it was told of.
GUARD = """
import os, signal, sys
groups = set()
for line in sys.stdin:
    groups ^= {int(line)}
for group in groups:
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        pass
"""

stop_signals: list[int] = []
"""The signals that asked this process to stop, in the order in which they came."""


class Problem(Exception):  # noqa: N818 - a message for a person
    """What went wrong, in words for the person at the terminal."""


def say(text: str) -> None:
    """Print a line at once, also into a pipe."""
    print(text, flush=True)


def tick() -> None:
    """Wait a moment.

    Raises:
        KeyboardInterrupt: somebody asked to stop.
    """
    time.sleep(TICK)
    if stop_signals:
        raise KeyboardInterrupt


def last_lines(log: Path, count: int) -> str:
    """Return the last lines of a log, however long it is."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 64 * 1024))
        lines = file.read().decode(errors="replace").splitlines()
    return "\n".join([line[:500] for line in lines if line.strip()][-count:])


def write_private(path: Path, text: str) -> None:
    """Replace a file at once, readable for its owner only."""
    new = path.with_name(path.name + ".new")
    new.unlink(missing_ok=True)
    with os.fdopen(os.open(new, os.O_CREAT | os.O_WRONLY | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    new.replace(path)


class Progress:
    """Says every few seconds how work that takes a while is going."""

    def __init__(self) -> None:
        self.began = self.said = time.monotonic()

    def tell(self, news: str) -> None:
        """Say it, unless something was said a moment ago."""
        now = time.monotonic()
        if now - self.said >= 4:
            self.said = now
            say(f"  {now - self.began:.0f} s: {news}")


class Part:
    """One program of the stack: its command, its process, its log."""

    def __init__(
        self, kind: str, argv: list[str], env: dict[str, str], cwd: Path, log: Path
    ) -> None:
        self.kind, self.argv, self.env, self.cwd, self.log = kind, argv, env, cwd, log
        self.url = ""
        self.process: subprocess.Popen[bytes] | None = None
        self.pid = self.deaths = 0
        self.started = self.due = 0.0
        log.unlink(missing_ok=True)

    def start(self) -> None:
        """Start it, leading a session: a terminal's Ctrl-C reaches run.py alone."""
        self.started = time.monotonic()
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(
                self.argv,
                cwd=self.cwd,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        self.pid = self.process.pid

    def runs(self) -> bool:
        """Whether its process lives."""
        return self.process is not None and self.process.poll() is None

    def kill_group(self) -> None:
        """Kill it and its children, or what is left of them."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
            self.process.wait()


class Stack:
    """Redis, workers and gateways of one data folder.

    Args:
        data: where logs, `run.json` and Redis's files go; one stack at a time may use it.
        redis_url: address of a Redis that is not ours; else empty until ours is added.
        drain: seconds that a gateway or a worker may take to finish its work before it ends.

    Raises:
        Problem: another stack uses the folder.
    """

    def __init__(self, data: Path, redis_url: str, drain: float = 0.0) -> None:
        self.data, self.redis_url, self.ready = data, redis_url, False
        self.control = secrets.token_urlsafe(18)  # who has it may kill parts from the page
        self._drain = drain
        self.parts: list[Part] = []
        (data / "logs").mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = (data / "lock").open("a")
        self._own_folder()
        self._guard = subprocess.Popen(
            [sys.executable, "-c", GUARD],
            stdin=subprocess.PIPE,
            text=True,
            start_new_session=True,
            pass_fds=[self._lock.fileno()],  # the folder is free when a killed stack is all gone
        )

    def _own_folder(self) -> None:
        deadline = time.monotonic() + LOCK_PATIENCE
        while True:
            with contextlib.suppress(BlockingIOError):
                return fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if time.monotonic() > deadline:
                raise Problem(f"another run.py uses {self.data}: stop it, or choose --data-dir")
            tick()

    def of(self, kind: str) -> list[Part]:
        """Return the parts that are a `redis`, a `worker` or a `gateway`."""
        return [part for part in self.parts if part.kind == kind]

    def add(
        self, kind: str, argv: list[str], env: dict[str, str], cwd: Path, url: str = ""
    ) -> None:
        """Start a part for the first time; a gateway has a `url`."""
        log = self.data / "logs" / f"{kind}-{len(self.of(kind)) + 1}.log"
        part = Part(kind, argv, env, cwd, log)
        part.url = url
        self.parts.append(part)
        self._start(part)

    def _start(self, part: Part) -> None:
        part.start()
        self._tell_guard(part)
        own = [part.pid for part in self.of("redis")]
        state = {
            "redis": {"pid": own[0] if own else None, "url": self.redis_url},
            "gateways": [{"pid": part.pid, "url": part.url} for part in self.of("gateway")],
            "workers": [{"pid": part.pid} for part in self.of("worker")],
            "control": self.control,
        }
        write_private(self.data / "run.json", json.dumps(state, indent=2))

    def _tell_guard(self, part: Part) -> None:
        """Have the guard watch a part's process group, or forget the one it watches."""
        if self._guard.stdin:
            with contextlib.suppress(BrokenPipeError):
                self._guard.stdin.write(f"{part.pid}\n")
                self._guard.stdin.flush()

    def tend(self) -> None:
        """Wait a tick, and start again what died.

        Raises:
            Problem: a part died twice before the stack was ready.
            KeyboardInterrupt: somebody asked to stop.
        """
        tick()
        for part in self.parts:
            if part.process is not None and not part.runs():
                self._bury(part, part.process.returncode)
            if part.process is None and time.monotonic() >= part.due:
                self._start(part)

    def _bury(self, part: Part, code: int) -> None:
        end = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        part.kill_group()
        self._tell_guard(part)
        part.process = None
        young = time.monotonic() - part.started < SHORT_LIFE
        part.deaths = part.deaths + 1 if young or not self.ready else 1
        if not self.ready and part.deaths >= TRIES:
            end += " before it was ready"
            raise Problem(f"{part.log.stem} {end}. Its log's end:\n{last_lines(part.log, 20)}")
        part.due = time.monotonic() + (min(5.0, 0.1 * 2**part.deaths) if part.deaths > 1 else 0)
        say(f"{part.log.stem} {end}; starting it again (log: {part.log})")

    def stop(self) -> None:
        """Stop gateways, then workers, then Redis; another Ctrl-C kills what is left."""
        patience = len(stop_signals)
        for kind, grace in (
            ("gateway", GRACE + self._drain),
            ("worker", GRACE + self._drain),
            ("redis", GRACE),
        ):
            group = self.of(kind)
            for part in filter(Part.runs, group):
                os.kill(part.pid, signal.SIGTERM)
            deadline = time.monotonic() + grace
            while any(map(Part.runs, group)) and time.monotonic() < deadline:
                if len(stop_signals) > patience:
                    break
                time.sleep(TICK / 5)
            for part in group:
                part.kill_group()
        (self.data / "run.json").unlink(missing_ok=True)
        self._guard.communicate()
        self._lock.close()
