"""The real thing for end-to-end tests: `run.py up` in a process of its own, on free ports."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import redis

from shared.settings import GatewaySettings, WorkerSettings

ROOT = Path(__file__).resolve().parent.parent
START_SECONDS = 120
STOP_SECONDS = 40


def wait_until(
    holds: Callable[[], Any], what: str, seconds: float = 20, every: float = 0.02
) -> Any:
    """Poll until `holds()` is truthy, and return that; fails with `what` after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (result := holds()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds:g} s: {what}")
        time.sleep(every)
    return result


def clean_environment() -> dict[str, str]:
    """Return the environment without the settings of whoever runs the tests."""
    fields = {*GatewaySettings.model_fields, *WorkerSettings.model_fields}
    return {key: value for key, value in os.environ.items() if key.lower() not in fields}


def keys_without_ttl(url: str) -> list[str]:
    """Return the names of the keys that would stay for ever."""
    with redis.Redis.from_url(url) as client:
        return [key.decode(errors="replace") for key in client.scan_iter() if client.ttl(key) == -1]


def alive(pid: int) -> bool:
    """Whether a process lives; a zombie does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def family(pid: int) -> list[int]:
    """Return a process and all below it."""
    try:
        parent = psutil.Process(pid)
        return [pid, *(child.pid for child in parent.children(recursive=True))]
    except psutil.NoSuchProcess:
        return []


class Stack:
    """A running stack.

    Args:
        folder: its data folder, not used by another.
        gateways: how many, each on a free port.
        workers: how many.
        model: a folder or a repository id; the demo model with random weights if none is given.
        port: of the first gateway; 0 for any free one.
        output_file: where the output of `run.py` goes; beside the folder if none is given.
        env: settings by their environment names, as `TORCH_DTYPE="float64"`.
    """

    def __init__(
        self,
        folder: Path,
        *,
        gateways: int = 1,
        workers: int = 1,
        model: str = "",
        port: int = 0,
        output_file: Path | None = None,
        env: dict[str, str] | None = None,
    ) -> None:
        self.folder, self.workers = folder, workers
        self.output_file = output_file or folder.with_name(folder.name + ".out")
        argv = [sys.executable, "run.py", "up", "--no-install", f"--port={port}"]
        argv += [f"--gateways={gateways}", f"--workers={workers}", f"--data-dir={folder}"]
        with self.output_file.open("wb") as out:
            self.process = subprocess.Popen(
                [*argv, f"--model={model}" if model else "--fast"],
                cwd=ROOT,
                env={**clean_environment(), **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )

    def __enter__(self) -> Stack:  # noqa: PYI034 - Python 3.10 has no Self
        try:
            self.wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_exc: object) -> None:
        self.stop()

    @property
    def output(self) -> str:
        """What `run.py` has printed so far."""
        return self.output_file.read_text(errors="replace")

    @property
    def state(self) -> dict[str, Any]:
        """The contents of `run.json`."""
        return dict(json.loads((self.folder / "run.json").read_text()))

    @property
    def gateways(self) -> list[dict[str, Any]]:
        """Each gateway's `pid` and `url`."""
        return list(self.state["gateways"])

    @property
    def url(self) -> str:
        """The first gateway's address."""
        return str(self.gateways[0]["url"])

    @property
    def redis_url(self) -> str:
        """The address of its Redis, password included."""
        return str(self.state["redis"]["url"])

    def pid(self, kind: str, index: int = 0) -> int:
        """Return the process id of a part: `redis`, `gateways` or `workers`."""
        parts = self.state[kind]
        return int((parts if kind == "redis" else parts[index])["pid"])

    def wait_until_ready(self) -> None:
        """Wait until `run.py` says so and each gateway knows of every worker."""

        def ready() -> bool:
            if self.process.poll() is not None:
                raise AssertionError(f"run.py ended: {self.logs()}")
            return "\nready http" in self.output

        try:
            wait_until(ready, "the stack is ready", START_SECONDS)
            for gateway in self.gateways:
                wait_until(
                    lambda url=gateway["url"]: self.workers_seen(url) == self.workers, "fleet"
                )
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.logs()}") from None

    @staticmethod
    def workers_seen(url: str) -> int:
        """Return how many ready workers a gateway knows of."""
        try:
            with urllib.request.urlopen(f"{url}/ready", timeout=5) as answer:
                return int(json.load(answer)["workers"])
        except urllib.error.HTTPError as error:
            error.close()
            return 0
        except OSError:
            return 0

    def kill(self, kind: str, index: int = 0, number: int = signal.SIGKILL) -> int:
        """Signal a part (`redis`, `gateways`, `workers`); returns the pid that it had."""
        pid = self.pid(kind, index)
        os.kill(pid, number)
        return pid

    def wait_restarted(self, kind: str, old_pid: int, index: int = 0) -> int:
        """Wait until a part that was killed runs again; returns its new pid."""
        wait_until(lambda: self.pid(kind, index) != old_pid, f"{kind} {index} runs again")
        return self.pid(kind, index)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Stop the stack; returns the exit code of `run.py`."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()  # its guard kills the rest
            raise AssertionError(f"run.py did not stop: {self.logs()}") from None

    def logs(self, characters: int = 6000) -> str:
        """Return the ends of all that the stack has printed and logged."""
        files = [self.output_file, *sorted((self.folder / "logs").glob("*.log"))]
        ends = [f"--- {f.name}\n{f.read_text(errors='replace')[-characters:]}" for f in files]
        return "\n".join(ends)
