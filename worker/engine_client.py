"""The asyncio side of the engine: starts its process, sends commands, hands out what comes back.

It watches the process and starts another where it dies, which sequences do not outlive.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import multiprocessing
import queue
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from shared.protocol import CancelReason
from worker import meter
from worker.engine.channel import Disconnected, FrameReader, encode, send_frame
from worker.engine.messages import (
    Abort,
    Add,
    Cancel,
    Command,
    EngineConfig,
    Loading,
    Output,
    Ready,
    Report,
    Step,
    Stop,
)
from worker.engine.process import run

log = logging.getLogger("unbroken.engine_client")

RESTART_DELAYS = (0.1, 1.0, 5.0, 15.0, 30.0)  # seconds before the next start, per death in a row
STABLE_SECONDS = 60.0  # an engine that served this long has a clean record again
STOP_SECONDS = 2.0  # given to each of: a polite end, SIGTERM


class LoadFailedError(Exception):
    """The model cannot be loaded; the message is a sentence for operator and client."""


@dataclass(frozen=True)
class EngineState:
    """Where the engine stands.

    `reason` says why it failed (no restart helps: it stays so until `restart`) or died (the next
    start is under way). `loading` is the last progress, `ready` what is served.
    """

    phase: Literal["loading", "ready", "failed", "dead"]
    reason: str | None = None
    loading: Loading | None = None
    ready: Ready | None = None


Sink = Callable[[Output | None], None]
"""Takes a sequence's outputs; None says that the engine process ended with the sequence in it."""


class EngineClient:
    """One engine process and the sequences in it. All methods belong to the event loop's thread.

    Args:
        config: what to load.
        on_state: is called in the event loop with each new state.
        on_step_end: is called after the outputs of one step went to their sinks.
        restart_delays: seconds to wait before a new start, after 1, 2, … deaths in a row.
    """

    def __init__(
        self,
        config: EngineConfig,
        on_state: Callable[[EngineState], None] = lambda _: None,
        on_step_end: Callable[[], None] = lambda: None,
        restart_delays: Sequence[float] = RESTART_DELAYS,
    ) -> None:
        self.config = config
        self.on_state, self.on_step_end = on_state, on_step_end
        self.state = EngineState("loading")
        self._restart_delays = restart_delays
        self._sinks: dict[int, Sink] = {}
        self._handles = itertools.count(1)
        self._process: _EngineProcess | None = None
        self._restarting: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()
        self._deaths = 0
        self._ready_since = 0.0

    @property
    def pid(self) -> int | None:
        """The engine's process id, while there is one."""
        return self._process.pid if self._process else None

    async def start(self) -> None:
        """Start the process and return; the state goes on by itself from "loading".

        Call it from the main thread: Linux ends the process with the thread that started it.
        """
        self._set_state(EngineState("loading"))
        self._process = process = _EngineProcess(self.config)
        process.watch(self._on_readable)

    async def ready(self) -> Ready:
        """Wait until the model is loaded.

        Raises:
            LoadFailedError: it cannot be loaded.
        """
        while self.state.ready is None:
            if self.state.phase == "failed":
                raise LoadFailedError(self.state.reason)
            self._changed.clear()
            await self._changed.wait()
        return self.state.ready

    def new_handle(self) -> int:
        """Return a handle that no other sequence of this client has."""
        return next(self._handles)

    def add(self, message: Add, sink: Sink) -> None:
        """Send a sequence to the engine.

        `sink` is called in the event loop, never from within this call, with each of its outputs,
        the last of which bears `finish` or `error`; or with None, at any time, and nothing after:
        the engine died, or there is none. While the model loads, sequences wait.
        """
        self._sinks[message.handle] = sink
        if self._process is None or self.state.phase in ("failed", "dead"):
            asyncio.get_running_loop().call_soon(self._bury, [message.handle])
        else:
            self._process.send(message)

    def cancel(self, handle: int, reason: CancelReason) -> None:
        """End a sequence; its last output comes as usual, with `cancelled` set."""
        self._send_about(handle, Cancel(handle, reason))

    def abort(self, handle: int) -> None:
        """Drop a sequence; its sink is not called again."""
        self._send_about(handle, Abort(handle))
        self._sinks.pop(handle, None)

    async def restart(self, reason: str = "The engine is restarted.") -> None:
        """End the process at once (it may hang), tell its sequences, and start a new one."""
        await self._cancel_restart()
        await self._leave(reason)
        await self.start()

    async def close(self) -> None:
        """End the process: ask, then SIGTERM, then SIGKILL, within a few seconds.

        The sinks of sequences still in it get None.
        """
        await self._cancel_restart()
        if self._process and self.state.phase == "ready":
            self._process.unwatch()  # its end is no death now
            self._process.send(Stop())
            await self._process.gone(STOP_SECONDS)
        await self._leave("The engine was closed.")

    def _send_about(self, handle: int, command: Command) -> None:
        if self._process and handle in self._sinks:
            self._process.send(command)

    async def _cancel_restart(self) -> None:
        if self._restarting and self._restarting is not asyncio.current_task():
            self._restarting.cancel()
            await asyncio.gather(self._restarting, return_exceptions=True)
        self._restarting = None

    async def _leave(self, reason: str) -> None:
        """Part with the process, dead or alive."""
        process, self._process = self._process, None
        if process:
            await process.end()
        self._set_state(EngineState("dead", reason))
        self._bury(self._sinks)

    def _bury(self, handles: Iterable[int]) -> None:
        """Tell sequences that there is no engine for them any more."""
        sinks = [self._sinks.pop(handle) for handle in list(handles) if handle in self._sinks]
        for sink in sinks:
            _call(sink, None)
        if sinks:
            self.on_step_end()

    def _set_state(self, state: EngineState) -> None:
        self.state = state
        self._changed.set()
        self.on_state(state)

    def _on_readable(self, process: _EngineProcess) -> None:
        try:
            reports = process.reader.read()
        except Disconnected:
            self._on_gone(process)
            return
        for report in reports:
            self._on_report(report)

    def _on_report(self, report: Report) -> None:
        if isinstance(report, Step):
            self._on_step(report)
        elif isinstance(report, Loading):
            self._set_state(EngineState("loading", loading=report))
        elif isinstance(report, Ready):
            log.info("model ready after %.1f s: %s", report.seconds, report.fingerprint)
            self._ready_since = time.monotonic()
            self._set_state(EngineState("ready", ready=report))
        else:
            log.error("the model cannot be loaded: %s", report.reason)
            self._set_state(EngineState("failed", report.reason))
            self._bury(self._sinks)

    def _on_step(self, step: Step) -> None:
        meter.step(step, self.state.ready)
        for output in step.outputs:
            last = output.finish is not None or output.error is not None
            sink = (self._sinks.pop if last else self._sinks.get)(output.handle, None)
            if sink is not None:  # None: aborted while this was on its way
                _call(sink, output)
        self.on_step_end()

    def _on_gone(self, process: _EngineProcess) -> None:
        """Act on a closed socket: the process has ended or is about to."""
        process.unwatch()
        self._restarting = asyncio.create_task(self._replace(process))

    async def _replace(self, process: _EngineProcess) -> None:
        """Find out how the process ended; start another, unless the model cannot be loaded."""
        await process.gone(STOP_SECONDS)
        await process.end()
        self._process = None
        if self.state.phase == "failed":
            return
        reason = process.epitaph(self.state.phase)
        log.error("%s", reason)
        if self.state.ready and time.monotonic() - self._ready_since > STABLE_SECONDS:
            self._deaths = 0
        self._set_state(EngineState("dead", reason))
        self._bury(self._sinks)
        while self._process is None:
            delay = self._restart_delays[min(self._deaths, len(self._restart_delays) - 1)]
            self._deaths += 1
            meter.engine_restarted()
            await asyncio.sleep(delay)
            try:
                await self.start()
            except OSError:  # no processes or memory to be had just now
                log.exception("the engine process could not be started")


class _EngineProcess:
    """One life of the engine process: its socket, and the thread that writes to it.

    A thread, since a prompt may hold megabytes of pixels: the event loop does not wait for them,
    and they cross at once instead of a socket buffer per turn of the loop.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.sock, theirs = socket.socketpair()
        self.reader = FrameReader(self.sock)
        self._watched = False
        self._process = multiprocessing.get_context("spawn").Process(
            target=run, args=(theirs, config), name="engine", daemon=True
        )
        self._process.start()
        self.pid = self._process.pid
        theirs.close()  # else its end would not close this socket
        self._commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._writer = threading.Thread(target=self._write, name="engine-writer", daemon=True)
        self._writer.start()

    def send(self, command: Command) -> None:
        """Send a command, in order, without waiting."""
        self._commands.put(command)

    def watch(self, on_readable: Callable[[_EngineProcess], None]) -> None:
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
        while self._process.is_alive():
            if time.monotonic() > deadline:
                return False
            await asyncio.sleep(0.01)
        return True

    async def end(self) -> None:
        """End the process by whatever it takes, and release what it held."""
        self.unwatch()
        if self._process.is_alive():
            self._process.terminate()
        if not await self.gone(STOP_SECONDS):
            self._process.kill()
            await self.gone(STOP_SECONDS)
        self._commands.put(None)
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)  # a write under way fails
        self._writer.join(STOP_SECONDS)  # microseconds: its socket is shut
        self.sock.close()

    def epitaph(self, phase: str) -> str:
        """Say in a sentence how the process ended, given the state that it ended in."""
        code = self._process.exitcode
        where = "while it loaded the model" if phase == "loading" else "while it served"
        if code is None or code >= 0:
            return f"The engine process ended {where} (exit code {code})."
        name = signal.Signals(-code).name
        hint = ", perhaps for want of memory" if phase == "loading" and name == "SIGKILL" else ""
        return f"The engine process was killed {where} ({name}{hint})."

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
                    self.sock.shutdown(socket.SHUT_RDWR)
                return  # the reader notices too, and acts on it


def _call(sink: Sink, output: Output | None) -> None:
    """Call a sink; its failure must not cost the others their outputs."""
    try:
        sink(output)
    except Exception:
        log.exception("a sequence's sink failed")
