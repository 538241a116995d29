"""The processes of the relay benchmark: Redis, gateways, the bare server, nginx, and helpers."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

import run

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ROOT = Path(__file__).resolve().parent.parent
START_SECONDS = 30

NGINX_CONF = """daemon off;
pid {folder}/nginx.pid;
worker_rlimit_nofile 16384;
error_log stderr warn;
worker_processes 1;
events {{ worker_connections 8192; }}
http {{
  access_log off;
  client_body_temp_path {folder}/body;
  proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi;
  scgi_temp_path {folder}/scgi;
  server {{
    listen 127.0.0.1:{port};
    location / {{
      proxy_pass http://127.0.0.1:{gateway};
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_buffering off;
      proxy_read_timeout 1h;
    }}
  }}
}}
"""


class Program:
    """A process that is measured from outside (Linux)."""

    def __init__(
        self, argv: Sequence[str], env: dict[str, str] | None = None, cwd: Path = ROOT
    ) -> None:
        self.process = subprocess.Popen(
            argv, cwd=cwd, env={**os.environ, **(env or {})}, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def tell(self, message: Any) -> None:
        """Write a JSON line to its stdin."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(message) + "\n")
        self.process.stdin.flush()

    def hear(self) -> Any:
        """Read a JSON line from its stdout."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.process.args} ended: {self.process.wait()}")
        return json.loads(line)

    def pids(self) -> list[int]:
        """Return its process and its children."""
        pid = self.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children")
        return [pid, *map(int, children.read_text().split())]

    def cpu_seconds(self) -> float:
        """Return the CPU time used so far, user and system, as `getrusage` counts it."""
        ticks = 0
        for pid in self.pids():
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def rss_kb(self) -> int:
        """Return the resident memory."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0])

    def stop(self) -> None:
        """End it."""
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@contextlib.contextmanager
def program(
    argv: Sequence[str], env: dict[str, str] | None = None, cwd: Path = ROOT
) -> Iterator[Program]:
    """Run a program; it ends with the block."""
    running = Program(argv, env, cwd)
    try:
        yield running
    finally:
        running.stop()


def python(module: str, *args: str, env: dict[str, str] | None = None) -> Any:
    """Run a module of this repository."""
    return program([sys.executable, "-m", module, *args], env)


@contextlib.contextmanager
def awake() -> Iterator[None]:
    """Keep all processors from sleeping, with loops that run only where nobody else wants to."""
    code = "import os; os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))\nwhile True: pass"
    with contextlib.ExitStack() as stack:
        for _ in range(os.cpu_count() or 1):
            stack.enter_context(program([sys.executable, "-c", code]))
        yield


def machine_ticks() -> tuple[int, int]:
    """Return the machine's busy and total CPU time so far, in clock ticks."""
    fields = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return sum(fields) - fields[3] - fields[4], sum(fields)


def wait_for_port(port: int) -> None:
    """Wait until somebody listens there."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
        else:
            return


@contextlib.contextmanager
def redis_server(folder: Path) -> Iterator[str]:
    """Run a Redis with the settings that `run.py` gives it; yields its URL."""
    port, password = run.free_port(), secrets.token_hex(16)
    folder.mkdir(exist_ok=True)
    (folder / "redis.conf").write_text(run.REDIS_CONF.format(port=port, password=password))
    with (folder / "redis.log").open("wb") as log:
        argv = [run.find_redis(sys.executable), "redis.conf"]
        server = subprocess.Popen(argv, cwd=folder, stdout=log, stderr=log)
        try:
            wait_for_port(port)
            yield f"redis://:{password}@127.0.0.1:{port}/0"
        finally:
            server.terminate()
            server.wait(10)


@contextlib.contextmanager
def gateway(redis_url: str) -> Iterator[tuple[Program, int]]:
    """Run a gateway; yields it and its port."""
    port = run.free_port()
    env = {"REDIS_URL": redis_url, "PORT": str(port), "HOST": "127.0.0.1", "API_KEYS": ""}
    env |= {"MAX_QUEUE": "100000", "LOG_LEVEL": "ERROR", "STRICT_MODEL": "0"}
    env |= {"SESSIONS_TTL_SECONDS": "3600", "KEEPALIVE_SECONDS": "15"}
    with python("benchmarks._relay_gateway", env=env) as running:
        wait_for_port(port)
        yield running, port


def wait_until_ready(port: int) -> None:
    """Wait until the gateway there knows of a worker."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            direct.open(f"http://127.0.0.1:{port}/ready", timeout=2).close()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
        else:
            return


@contextlib.contextmanager
def nginx(folder: Path, gateway_port: int) -> Iterator[tuple[Program, int] | None]:
    """Run nginx before a gateway, where there is an nginx; yields it and its port, or None."""
    places = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"))
    path, port = shutil.which("nginx", path=places), run.free_port()
    if path is None:
        yield None
        return
    folder.mkdir(exist_ok=True)
    conf = folder / "nginx.conf"
    conf.write_text(NGINX_CONF.format(folder=folder, port=port, gateway=gateway_port))
    with program([path, "-p", str(folder), "-c", str(conf)]) as running:
        wait_for_port(port)
        yield running, port
