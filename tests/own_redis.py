"""A Redis of a test's own, which it may kill, freeze and start again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import run


class OwnRedis:
    """A Redis with an append-only file, on a port it keeps.

    Args:
        folder: for its configuration, its log and its data.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, run.free_port()
        (folder / "redis.conf").write_text(run.REDIS_CONF.format(port=self.port, password="pw"))
        self.url = f"redis://:pw@127.0.0.1:{self.port}/0"
        self.start()

    def start(self) -> None:
        """Start it, with the data that it had."""
        with (self.folder / "redis.log").open("ab") as log:
            argv = [run.find_redis(sys.executable), "redis.conf"]
            self.process = subprocess.Popen(argv, cwd=self.folder, stdout=log, stderr=log)

    def kill(self) -> None:
        """SIGKILL it, and wait for its end."""
        self.process.kill()
        self.process.wait()
