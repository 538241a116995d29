"""One life of the engine process, seen from the worker: its socket, its end, and how it ended."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import signal
import socket
import threading
import time
from collections.abc import Callable

from worker.engine.channel import Disconnected, FrameReader, encode, send_frame
from worker.engine.messages import Command, EngineConfig
from worker.launch import Launch

log = logging.getLogger("unbroken.engine_process")

STOP_SECONDS = 2.0  # given to each of: a polite end, SIGTERM


class EngineProcess:
    """One life of the engine process: its socket, and the thread that writes to it.

    A thread, since a prompt may hold megabytes of pixels: the event loop does not wait for them,
    and they cross at once instead of a socket buffer per turn of the loop.
    """

    def __init__(self, config: EngineConfig, launch: Launch) -> None:
        self.sock, self._process = launch("worker.engine.process:run", (config,))
        self.reader = FrameReader(self.sock)
        self._watched = False
        self._commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._writer = threading.Thread(target=self._write, name="engine-writer", daemon=True)
        self._writer.start()

    @property
    def pid(self) -> int | None:
        """Its process id, once it is known."""
        return self._process.pid

    def send(self, command: Command) -> None:
        """Send a command, in order, without waiting."""
        self._commands.put(command)

    def watch(self, on_readable: Callable[[EngineProcess], None]) -> None:
        """Call back in the event loop whenever something has arrived."""
        asyncio.get_running_loop().add_reader(self.sock, on_readable, self)
        self._watched = True

    def unwatch(self) -> None:
        """Stop calling back."""
        if self._watched:
            asyncio.get_running_loop().remove_reader(self.sock)
        self._watched = False

    async def gone(self, seconds: float) -> bool:
        """Wait up to `seconds` for the process's end; return whether it came."""
        deadline = time.monotonic() + seconds
        while self._process.poll() is None:
            if time.monotonic() > deadline:
                return False
            await asyncio.sleep(0.01)
        return True

    async def end(self) -> None:
        """End the process by whatever it takes, and release what it held."""
        self.unwatch()
        if self._process.poll() is None:
            self._process.terminate()
        if not await self.gone(STOP_SECONDS):
            self._process.kill()
            await self.gone(STOP_SECONDS)
        self._commands.put(None)
        self._shut()  # a write under way fails
        self._writer.join(STOP_SECONDS)  # microseconds: its socket is shut
        self.sock.close()

    def kill(self) -> None:
        """End the process at once; the reader sees the end, even of one that is not forked yet."""
        self._process.kill()
        self._shut()

    def epitaph(self, phase: str) -> str:
        """Say in a sentence how the process ended, given the state that it ended in."""
        code = self._process.poll()
        where = "while it loaded the model" if phase == "loading" else "while it served"
        if code is None or code >= 0:
            return f"The engine process ended {where} (exit code {code})."
        name = signal.Signals(-code).name
        hint = ", perhaps for want of memory" if name == "SIGKILL" else ""  # or somebody's kill
        return f"The engine process was killed {where} ({name}{hint})."

    def _shut(self) -> None:
        with contextlib.suppress(OSError):  # it is closed, or the other end is
            self.sock.shutdown(socket.SHUT_RDWR)

    def _write(self) -> None:
        while True:
            command = self._commands.get()
            if command is None:
                return
            try:
                send_frame(self.sock, encode(command))
            except Exception as error:
                if not isinstance(error, Disconnected):  # deaf, it is as good as dead
                    log.exception("a command could not be sent")
                    self._shut()
                return  # the reader notices too, and acts on it
