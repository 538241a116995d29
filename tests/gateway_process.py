"""A gateway as a process of its own, for tests that cut, kill or restart it."""

from __future__ import annotations

import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import run
from tests.stack import ROOT, clean_environment


class GatewayProcess:
    """`python -m gateway.main` on a free port; the same port after a restart.

    Args:
        redis_url: its Redis.
        folder: where its log goes.
        env: more settings by their environment names.
    """

    def __init__(self, redis_url: str, folder: Path, env: dict[str, str] | None = None) -> None:
        self.port = run.free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._env = {**clean_environment(), "REDIS_URL": redis_url, "PORT": str(self.port)}
        self._env |= env or {}
        self._log = folder / f"gateway-{self.port}.log"
        self.start()

    def start(self) -> None:
        """Start it, and wait until it answers."""
        with self._log.open("ab") as log:
            argv = [sys.executable, "-m", "gateway.main"]
            self.process = subprocess.Popen(argv, cwd=ROOT, env=self._env, stdout=log, stderr=log)
        deadline = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=2).close()
            except OSError:
                if time.monotonic() > deadline or self.process.poll() is not None:
                    raise AssertionError(self._log.read_text()) from None
                time.sleep(0.02)
            else:
                return

    def kill(self) -> None:
        """End it at once, as a crash does."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """Ask it to end; returns its exit code."""
        self.process.terminate()
        return self.process.wait(20)
