"""The asyncio side of the engine: starts its process, sends commands, hands out what comes back.

It watches the process, and starts another where it dies, hangs or cannot load the model. Sequences
do not outlive it: their owner is told, and decides whether to continue them.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from shared.protocol import CancelReason
from shared.tasks import stop
from worker import meter
from worker.engine.channel import Disconnected
from worker.engine.messages import (
    Abort,
    Add,
    Busy,
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
from worker.engine_process import STOP_SECONDS, EngineProcess
from worker.launch import Launch, execute

log = logging.getLogger("unbroken.engine_client")

RESTART_DELAYS = (0.1, 1.0, 5.0, 15.0, 30.0)  # seconds before the next start, per death in a row
STABLE_SECONDS = 60.0  # an engine that served this long has a clean record again
LOAD_DELAYS = (30.0, 60.0, 120.0, 300.0)  # seconds before the next try to load the model
STEP_SECONDS = 120.0
FIRST_STEP = 3.0  # how many times longer the first step may take: kernels are chosen, memory found
WATCH_SECONDS = 0.25


class LoadFailedError(Exception):
    """The model cannot be loaded; the message is a sentence for operator and client."""


@dataclass(frozen=True)
class EngineState:
    """Where the engine stands.

    `reason` says why it failed (the model cannot be loaded; tried again later) or died (the next
    start is under way). `loading` is the last progress, `ready` what is served.
    """

    phase: Literal["loading", "ready", "failed", "dead"]
    reason: str | None = None
    loading: Loading | None = None
    ready: Ready | None = None


Sink = Callable[[Output | None], None]
"""Takes a sequence's outputs; None says that the engine process ended with the sequence in it."""


def _nobody_asks() -> None:
    """Take note of nothing."""


class EngineClient:
    """One engine process and the sequences in it. All methods belong to the event loop's thread.

    Args:
        config: what to load.
        on_state: is called in the event loop with each new state.
        on_step_end: is called after the outputs of one step went to their sinks.
        restart_delays: seconds to wait before a new start, after 1, 2, … deaths in a row.
        load_delays: the same, after loads that failed.
        step_seconds: an engine with sequences that is silent for so long hangs, and is killed.
        launch: starts the process.
    """

    def __init__(
        self,
        config: EngineConfig,
        on_state: Callable[[EngineState], None] = lambda _: None,
        on_step_end: Callable[[], None] = lambda: None,
        restart_delays: Sequence[float] = RESTART_DELAYS,
        load_delays: Sequence[float] = LOAD_DELAYS,
        step_seconds: float = STEP_SECONDS,
        launch: Launch = execute,
    ) -> None:
        self.config = config
        self.on_state, self.on_step_end = on_state, on_step_end
        self.state = EngineState("loading")
        self._delays = {"dead": restart_delays, "failed": load_delays}
        self._step_seconds, self._launch = step_seconds, launch
        self._sinks: dict[int, Sink] = {}
        self._handles = itertools.count(1)
        self._process: EngineProcess | None = None
        self._restarting: asyncio.Task[None] | None = None
        self._watching: asyncio.Task[None] | None = None
        self._silence = 0.0  # seconds since the engine last spoke, as far as this loop ran
        self._stepped = False
        self._verdict: str | None = None  # why it was killed from here
        self._admitted: set[int] = set()
        self._on_begin: dict[int, Callable[[], None]] = {}
        self._suspects: frozenset[int] = frozenset()
        self._changed = asyncio.Event()
        self._deaths = 0
        self._plain = False  # graphs are off: an engine has died of making them, perhaps
        self._ready_since = float("inf")

    @property
    def pid(self) -> int | None:
        """The engine's process id, while there is one."""
        return self._process.pid if self._process else None

    async def start(self) -> None:
        """Start the process and return; the state goes on by itself from "loading".

        Call it from the main thread: Linux ends the process with the thread that started it.
        """
        self._set_state(EngineState("loading"))
        graphs = self.config.graphs and not self._plain
        config = dataclasses.replace(self.config, graphs=graphs)
        self._process = process = EngineProcess(config, self._launch)
        process.watch(self._on_readable)
        self._silence, self._stepped, self._verdict = 0.0, False, None
        self._ready_since = float("inf")
        self._admitted, self._suspects = set(), frozenset()
        if self._watching is None:
            self._watching = asyncio.create_task(self._watch(), name="engine watch")

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

    def blames(self, handle: int) -> bool:
        """Tell, as a sink is told that the engine died, whether its sequence may be the reason.

        Those that the engine had not begun are not, nor those beside the one it was busy with.
        """
        suspects = self._suspects or self._admitted
        return not suspects or handle in suspects

    def add(self, message: Add, sink: Sink, on_begin: Callable[[], None] = _nobody_asks) -> None:
        """Send a sequence to the engine.

        `sink` is called in the event loop, never from within this call, with each of its outputs,
        the last of which bears `finish` or `error`; or with None, at any time, and nothing after:
        the engine died, or there is none. While the model loads, sequences wait. `on_begin` is
        called once, when the engine begins to compute it.
        """
        if not self._sinks:
            self._silence = 0.0
        self._sinks[message.handle], self._on_begin[message.handle] = sink, on_begin
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
        self._on_begin.pop(handle, None)
        self._admitted.discard(handle)

    async def restart(self, reason: str = "The engine is restarted.") -> None:
        """End the process at once (it may hang), tell its sequences, and start a new one."""
        await self._cancel_restart()
        await self._leave(reason)
        await self.start()

    async def close(self) -> None:
        """End the process: ask, then SIGTERM, then SIGKILL, within a few seconds.

        The sinks of sequences still in it get None.
        """
        if self._watching:
            await stop(self._watching)
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
        self._set_state(EngineState("dead", reason))
        self._bury(self._sinks)
        if process:
            await process.end()

    def _bury(self, handles: Iterable[int]) -> None:
        """Tell sequences that there is no engine for them any more."""
        gone = {
            handle: self._sinks.pop(handle) for handle in list(handles) if handle in self._sinks
        }
        for handle, sink in gone.items():
            self._on_begin.pop(handle, None)
            _call(sink, None)
        if gone:
            self.on_step_end()

    def _set_state(self, state: EngineState) -> None:
        self.state = state
        self._changed.set()
        self.on_state(state)

    def _on_readable(self, process: EngineProcess) -> None:
        try:
            reports = process.reader.read()
        except Disconnected:
            self._on_gone(process)
            return
        self._silence = 0.0
        for report in reports:
            self._on_report(report)

    def _on_report(self, report: Report) -> None:
        if isinstance(report, Step):
            self._on_step(report)
        elif isinstance(report, Busy):
            self._suspects = frozenset(report.handles)
            self._admitted.update(h for h in report.handles if h in self._sinks)
            for handle in report.handles:
                self._on_begin.pop(handle, _nobody_asks)()
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
        self._stepped = True
        for output in step.outputs:
            last = output.finish is not None or output.error is not None
            sink = (self._sinks.pop if last else self._sinks.get)(output.handle, None)
            if last:
                self._admitted.discard(output.handle)
                self._on_begin.pop(output.handle, None)
            if sink is not None:  # None: aborted while this was on its way
                _call(sink, output)
        self.on_step_end()

    def _on_gone(self, process: EngineProcess) -> None:
        """Act on a closed socket: the process has ended or is about to."""
        process.unwatch()
        self._restarting = asyncio.create_task(self._replace(process))

    async def _replace(self, process: EngineProcess) -> None:
        """Find out how the process ended, and start another, later where the model cannot load."""
        await process.gone(STOP_SECONDS)
        await process.end()
        self._process = None
        if self.state.phase != "failed":
            reason = self._verdict or process.epitaph(self.state.phase)
            log.error("%s", reason)
            self._plain = self.config.graphs and self.state.phase == "loading"
            if self._plain:
                log.warning("the next engine is started without CUDA graphs")
            if time.monotonic() - self._ready_since > STABLE_SECONDS:
                self._deaths = 0
            self._set_state(EngineState("dead", reason))
            self._bury(self._sinks)
        delays = self._delays[self.state.phase]
        while self._process is None:
            delay = delays[min(self._deaths, len(delays) - 1)]
            self._deaths += 1
            meter.engine_restarted()
            await asyncio.sleep(delay)
            try:
                await self.start()
            except OSError:  # no processes or memory to be had just now
                log.exception("the engine process could not be started")

    async def _watch(self) -> None:
        """Kill an engine that says nothing for longer than a step may take.

        Only time in which this loop ran counts: after a pause of the whole worker, what the engine
        said meanwhile is read first.
        """
        before = time.monotonic()
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            now = time.monotonic()
            self._silence += min(now - before, 2 * WATCH_SECONDS)
            before = now
            if not self._sinks or self.state.phase != "ready":
                self._silence = 0.0
            limit = self._step_seconds * (1.0 if self._stepped else FIRST_STEP)
            if self._process and self._silence > limit:
                self._verdict = f"The engine process hung: it was silent for {limit:g} s."
                self._set_state(EngineState("dead", self._verdict))
                self._bury(self._sinks)
                self._process.kill()


def _call(sink: Sink, output: Output | None) -> None:
    """Call a sink; its failure must not cost the others their outputs."""
    try:
        sink(output)
    except Exception:
        log.exception("a sequence's sink failed")
