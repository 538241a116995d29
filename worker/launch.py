"""Starts child processes: in a new interpreter, or forked from one that has imported torch already.

A child runs `function(sock, *args)`, named `"module:function"`. The arguments travel over the
socket, not on the command line: they may hold a token.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import logging
import runpy
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from worker.engine.channel import Disconnected, encode, send_frame
from worker.launch_entry import command

log = logging.getLogger("unbroken.launch")

PRELOAD = "worker.engine.preload:preload"
PACKET = 4096
"""Longest packet between a template and its parent, bytes."""


class Process(Protocol):
    """What a parent may do with a child; as `subprocess.Popen` has it."""

    @property
    def pid(self) -> int | None:
        """Its id, once it is known."""

    @property
    def returncode(self) -> int | None:
        """Its exit code, or minus the signal that ended it, once it was asked for."""

    def poll(self) -> int | None:
        """Return the exit code if it has ended."""

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end, up to `timeout` seconds; `subprocess.TimeoutExpired` after that."""

    def terminate(self) -> None:
        """Send SIGTERM."""

    def kill(self) -> None:
        """Send SIGKILL."""


Launch = Callable[[str, tuple[Any, ...]], tuple[socket.socket, Process]]
"""Starts `"module:function"` with arguments (picklable); returns our end of the child's socket.

Call it in the main thread: Linux ends the child with the thread that started it.
"""


def execute(target: str, args: tuple[Any, ...]) -> tuple[socket.socket, Process]:
    """Start a child in an interpreter of its own."""
    sock, theirs = socket.socketpair()
    with theirs:  # else its end would not close this socket
        process = _interpreter("main", theirs)
    _tell(sock, target, args)
    return sock, process


class Template:
    """A process that has imported torch and Transformers, and forks itself for each child.

    It is started with the first child, runs one thread and none of torch's work, so that there is
    nothing a fork could tear apart. When it ends, so do its children; the next one gets a new one.

    Args:
        log_level: of the template, and of its children until they set their own.
        preload: the function that imports what the children need, `"module:function"`.
    """

    def __init__(self, log_level: str = "INFO", preload: str = PRELOAD) -> None:
        self._words = (preload, log_level)
        self._numbers = itertools.count(1)
        self._life: _Life | None = None

    def launch(self, target: str, args: tuple[Any, ...]) -> tuple[socket.socket, Process]:
        """Fork a child; returns at once, even while the template imports. See `Launch`."""
        if self._life is None or self._life.over:
            self.close()
            self._life = _Life(*self._words)
        sock, theirs = socket.socketpair()
        with theirs:
            process = self._life.fork(next(self._numbers), theirs)
        _tell(sock, target, args)
        return sock, process

    def close(self) -> None:
        """End the template, and with it all children that are left."""
        if self._life is not None:
            self._life.end()
        self._life = None


class _Life:
    """One process that is a template, and the thread that hears from it."""

    def __init__(self, *words: str) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = _interpreter("template", theirs, *words)
        self._children: dict[int, _Forked] = {}
        self._lock = threading.Lock()
        self.over = False
        self._listener = threading.Thread(target=self._listen, name="template", daemon=True)
        self._listener.start()

    def fork(self, number: int, theirs: socket.socket) -> _Forked:
        child = _Forked(lambda sent: self._send(["signal", number, sent]))
        with self._lock:
            if self.over:
                child.ended(-signal.SIGKILL)
            self._children[number] = child
        self._send(["fork", number], theirs)
        return child

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        self._listener.join()
        self._control.close()

    def _send(self, message: list[Any], *socks: socket.socket) -> None:
        packet, files = json.dumps(message).encode(), [sock.fileno() for sock in socks]
        with contextlib.suppress(OSError):  # it is gone: the listener says so to all
            socket.send_fds(self._control, [packet], files)

    def _listen(self) -> None:
        while packet := self._hear():
            what, number, value = json.loads(packet)
            with self._lock:
                child = self._children.pop(number) if what == "end" else self._children[number]
            child.ended(value) if what == "end" else child.born(value)
        with self._lock:
            self.over = True
            left = list(self._children.values())
        for child in left:
            child.ended(-signal.SIGKILL)

    def _hear(self) -> bytes:
        try:
            return self._control.recv(PACKET)
        except OSError:
            return b""


class _Forked:
    """A child of a template, through which signals go: it knows whether the child still lives."""

    def __init__(self, send: Callable[[int], None]) -> None:
        self._send = send
        self._over = threading.Event()
        self.pid: int | None = None
        self.returncode: int | None = None

    def born(self, pid: int) -> None:
        self.pid = pid

    def ended(self, code: int) -> None:
        if self.returncode is None:
            self.returncode = code
        self._over.set()

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._over.wait(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("a forked child", timeout or 0)
        return self.returncode

    def terminate(self) -> None:
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        self._send(number)
        if self.pid is None:  # the template still imports: what it forks for this dies at once
            self.ended(-number)


def for_engine(template: Template) -> Launch:
    """Return how to start the engine: forked where torch computes on the CPU alone.

    Elsewhere it gets an interpreter of its own. Importing torch leaves the device alone, but
    nothing promises that for all libraries, and a driver that has begun does not survive a fork.
    """
    return template.launch if forks() and _torch_is_for_cpus() else execute


def for_processor(template: Template) -> Launch:
    """Return how to start a prompt processor, which computes on the CPU everywhere."""
    return template.launch if forks() else execute


def forks() -> bool:
    """Whether processes with libraries may fork here: not on macOS, whose own ones forbid it."""
    return sys.platform == "linux"


def _torch_is_for_cpus() -> bool:
    """Read what torch was built for from a small file in it: importing it takes seconds."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        return False
    version = runpy.run_path(str(Path(found.origin).with_name("version.py")))
    return not any(version.get(name) for name in ("cuda", "hip", "xpu"))


def _interpreter(main: str, theirs: socket.socket, *words: str) -> subprocess.Popen[bytes]:
    fd = theirs.fileno()
    argv = command(main, fd, *words)
    return subprocess.Popen(argv, stdin=subprocess.DEVNULL, pass_fds=(fd,))  # noqa: S603 - our own


def _tell(sock: socket.socket, target: str, args: tuple[Any, ...]) -> None:
    with contextlib.suppress(Disconnected):  # it is gone: whoever reads notices
        send_frame(sock, encode((target, args)))
