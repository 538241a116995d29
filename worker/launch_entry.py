"""The other side of `worker.launch`: how a child begins, and what children fork from."""

from __future__ import annotations

import ctypes
import importlib
import json
import logging
import os
import select
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from shared import logs
from worker.engine.channel import Channel, Disconnected

log = logging.getLogger("unbroken.template")

# SIGINT goes to the whole terminal group, but stopping is the parent's business; `sys.path` is
# handed over, because the parent may have been started from anywhere.
_BOOT = (
    "import signal, sys, json; signal.signal(signal.SIGINT, signal.SIG_IGN); "
    "sys.path[:] = json.loads(sys.argv[1]); "
    "from worker.launch_entry import {main}; {main}(int(sys.argv[2]), *sys.argv[3:])"
)
_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15
_PACKET = 4096


def command(main: str, fd: int, *words: str) -> list[str]:
    """Return the command line of an interpreter that calls `main(fd, *words)` of this module."""
    return [sys.executable, "-c", _BOOT.format(main=main), json.dumps(sys.path), str(fd), *words]


def main(fd: int) -> None:
    """Be a child: run what the first message on the socket names."""
    _control_process(_PR_SET_PDEATHSIG, signal.SIGKILL)  # ends with its parent, whatever it does
    sock = socket.socket(fileno=fd)
    try:
        target, args = Channel(sock).receive()
    except Disconnected:
        return
    _named(target)(sock, *args)


def set_name(name: str) -> None:
    """Give this process a name for `ps` and `top` (Linux; 15 characters)."""
    _control_process(_PR_SET_NAME, name.encode()[:15])


def template(fd: int, preload: str, log_level: str) -> None:
    """Import what children need, then fork one for each that is asked for, until the parent ends.

    Once an import has failed, children are forked all the same, but each starts an interpreter of
    its own: what is left of a half-imported library fails for ever, and in other words.

    Packets are JSON lists: `["fork", number]` with the child's socket, `["signal", number, signal]`
    come in; `["pid", number, pid]` and `["end", number, exit code]` go out.
    """
    _control_process(_PR_SET_PDEATHSIG, signal.SIGKILL)
    set_name("template")
    logs.configure(log_level)
    be_child = main
    try:
        _named(preload)()
    except Exception:
        log.exception("imports failed")  # each child will say why in its own words
        be_child = _execute
    _Template(socket.socket(fileno=fd), be_child).serve()


class _Template:
    """Forks, signals and reaps; one thread does it all, in order."""

    def __init__(self, control: socket.socket, be_child: Callable[[int], None]) -> None:
        self._control, self._main = control, be_child
        self._numbers: dict[int, int] = {}  # of living children, by pid
        self._ended, wake = os.pipe()
        os.set_blocking(wake, False)
        os.set_blocking(self._ended, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wake)

    def serve(self) -> None:
        """Do what is asked until the parent is gone."""
        sources: list[Any] = [self._control, self._ended]
        while True:
            readable, _, _ = select.select(sources, [], [])
            if self._ended in readable:
                os.read(self._ended, _PACKET)
                self._reap()
            if self._control in readable:
                packet, files, _, _ = socket.recv_fds(self._control, _PACKET, 1)
                if not packet:
                    return
                what, number, *value = json.loads(packet)
                if what == "fork":
                    self._fork(number, files[0])
                else:
                    self._signal(number, *value)

    def _fork(self, number: int, fd: int) -> None:
        try:
            pid = os.fork()
        except OSError:  # no processes or memory to be had just now
            log.exception("cannot fork")
            self._send("end", number, 1)
            return
        else:
            if pid == 0:
                self._be_child(fd)
        finally:
            os.close(fd)
        self._numbers[pid] = number
        self._send("pid", number, pid)

    def _be_child(self, fd: int) -> NoReturn:
        """Run as the child; never return into the template's own code."""
        code = 1
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            self._control.close()
            self._main(fd)
            code = 0
        except BaseException:  # noqa: BLE001 - this is the child's outermost frame
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def _signal(self, number: int, sent: int) -> None:
        for pid, owner in self._numbers.items():
            if owner == number:  # it is not reaped yet, so the pid is its own
                os.kill(pid, sent)

    def _reap(self) -> None:
        while self._numbers:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            code = os.waitstatus_to_exitcode(status)
            self._send("end", self._numbers.pop(pid), code)

    def _send(self, *message: Any) -> None:
        try:
            self._control.send(json.dumps(message).encode())
        except OSError:
            sys.exit(0)  # the parent is gone


def _named(target: str) -> Callable[..., Any]:
    module, _, name = target.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return found


def _execute(fd: int) -> NoReturn:
    """Become a fresh interpreter that is a child."""
    os.set_inheritable(fd, True)
    argv = command("main", fd)
    os.execv(argv[0], argv)  # noqa: S606 - our own


def _control_process(option: int, value: Any) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value)
