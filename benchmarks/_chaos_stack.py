"""The stack under chaos: `run.py up` with its supervisor, in a folder of its own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.settings import GatewaySettings, WorkerSettings

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parent.parent
START_SECONDS = 300
STOP_SECONDS = 60


@dataclass(frozen=True)
class Part:
    """A program of the stack, as it runs now. `name` is a worker's id in Redis, else empty."""

    kind: str
    number: int
    pid: int
    port: int = 0
    name: str = ""

    def signal(self, number: int) -> bool:
        """Signal it, with its children where it is to freeze or go on; False if it is gone."""
        send = os.killpg if number in (signal.SIGSTOP, signal.SIGCONT) else os.kill
        try:
            send(self.pid, number)
        except ProcessLookupError:
            return False
        return True

    def lives(self) -> bool:
        """Whether its process is there; one that has ended and is not yet buried is not."""
        try:
            state = Path(f"/proc/{self.pid}/stat").read_text().rpartition(") ")[2][0]
        except OSError:
            return False
        return state not in "ZX"


class Stack:
    """A running stack; its parts are started again by their supervisor.

    Args:
        folder: its data folder.
        gateways: how many.
        workers: how many.
        env: settings by their environment names.
    """

    def __init__(self, folder: Path, *, gateways: int, workers: int, env: dict[str, str]) -> None:
        self.folder, self.workers, self.out = folder, workers, folder.with_suffix(".out")
        fields = {*GatewaySettings.model_fields, *WorkerSettings.model_fields}
        clean = {k: v for k, v in os.environ.items() if k.lower() not in fields}
        argv = [sys.executable, "run.py", "up", "--no-install", "--port=0"]
        argv += ["--model=models/demo-fast", f"--data-dir={folder}"]
        argv += [f"--gateways={gateways}", f"--workers={workers}"]
        with self.out.open("wb") as out:
            self.process = subprocess.Popen(
                argv, cwd=ROOT, env={**clean, **env}, stdin=subprocess.DEVNULL, stdout=out,
                stderr=out, start_new_session=True,
            )  # fmt: skip

    def wait_until_ready(self) -> None:
        """Wait until every gateway knows of every worker."""
        deadline = time.monotonic() + START_SECONDS
        while not (
            "\nready http" in self.out.read_text()
            and all(workers_seen(url) == self.workers for url in self.urls)
        ):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"the stack does not start:\n{self.out.read_text()}")
            time.sleep(0.1)

    @property
    def state(self) -> dict[str, Any]:
        """What `run.json` says."""
        return dict(json.loads((self.folder / "run.json").read_text()))

    @property
    def urls(self) -> list[str]:
        """The gateways' addresses, which stay when they are started again."""
        return [str(gateway["url"]) for gateway in self.state["gateways"]]

    def parts(self) -> list[Part]:
        """Return the parts that live now."""
        state = self.state
        found = [Part("redis", 1, state["redis"]["pid"])]
        for number, gateway in enumerate(state["gateways"], 1):
            port = int(gateway["url"].rpartition(":")[2])
            found.append(Part("gateway", number, gateway["pid"], port))
        for number, worker in enumerate(state["workers"], 1):
            found.append(Part("worker", number, worker["pid"], name=self._worker_id(number)))
        return [part for part in found if part.lives()]

    def _worker_id(self, number: int) -> str:
        """Return the id that the worker's newest process gave itself; empty while it starts."""
        path = self.folder / "logs" / f"worker-{number}.log"
        for line in reversed(path.read_text(errors="replace").splitlines()):
            if '"stopped"' in line:
                return ""
            if '"startup"' in line:
                return str(json.loads(line)["worker"])
        return ""

    def log_lines(self, name: str) -> Iterator[dict[str, Any]]:
        """Yield the lines of a part's log, over all of its lives."""
        path = self.folder / "logs" / f"{name}.log"
        for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
            with contextlib.suppress(json.JSONDecodeError):
                yield json.loads(line)

    def worker_logs(self) -> Iterator[dict[str, Any]]:
        """Yield the lines of all workers' logs."""
        for number in range(1, self.workers + 1):
            yield from self.log_lines(f"worker-{number}")

    def stop(self) -> None:
        """End it, and let no part stay frozen."""
        with contextlib.suppress(OSError):
            for part in self.parts():
                part.signal(signal.SIGCONT)
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()  # its guard ends the parts
            self.process.wait()


def workers_seen(url: str) -> int:
    """Return how many ready workers a gateway knows of; 0 where it does not answer."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(f"{url}/ready", timeout=5) as answer:
            return int(json.load(answer)["workers"])
    except OSError:
        return 0
