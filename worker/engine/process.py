"""The engine process: what runs in it from its first line to its last.

Imports torch only once it runs, so that the worker's asyncio process can name `run` without it.
"""

from __future__ import annotations

import gc
import logging
import socket
import threading
import time
from typing import TYPE_CHECKING

from shared import logs
from worker.engine.channel import Channel, Disconnected
from worker.engine.messages import Busy, EngineConfig, LoadFailed, Loading, Ready, Step, Stop
from worker.launch_entry import set_name

if TYPE_CHECKING:
    from worker.engine.engine import Engine

log = logging.getLogger("unbroken.engine")

BEAT_SECONDS = 0.5
"""An engine at work is not silent for longer, unless a step takes longer."""
LULL_SECONDS = 0.5
"""After so long without work, records are made with which the last prompts had been faster."""
OFTEN = 256
"""Where no lull comes: so many pieces of prompts pay for the record that they have lacked."""


def run(sock: socket.socket, config: EngineConfig) -> None:
    """Load the model, then step until told to stop or the worker is gone.

    Reports `Loading`, then `Ready` or `LoadFailed`, then one `Step` per step that has something to
    say, `Busy` now and then. A lost device ends the process, and the worker starts another.

    Args:
        sock: one end of a socket pair; `worker.engine.channel` frames on it.
        config: what to load.
    """
    set_name("engine")
    logs.configure(config.log_level)
    channel = Channel(sock)
    try:
        engine = _load(channel, config)
        if engine is not None:
            _serve(channel, engine, config.pace_seconds)
    except Disconnected:
        log.info("the worker is gone")


def _load(channel: Channel, config: EngineConfig) -> Engine | None:
    """Build the engine and report how that goes; None where it cannot be built."""
    began = time.monotonic()
    lock = threading.Lock()  # downloads report from several threads

    def progress(stage: str, fraction: float | None) -> None:
        with lock:
            channel.send(Loading(stage, fraction))

    progress("importing the libraries", None)
    from worker.engine.torchvision_shim import prepare_torchvision

    prepare_torchvision()  # transformers imports it, wherever it is installed
    from worker.engine.engine import Engine
    from worker.engine.loader import LoadError, load, use_threads

    use_threads(config.threads)
    try:
        loaded = load(config, progress)
        progress("checking the model", None)
        engine = Engine(
            loaded,
            config.max_batch_size,
            lambda handles: channel.send(Busy(handles)),
            config.limits,
        )
    except LoadError as error:
        channel.send(LoadFailed(str(error)))
        return None
    gc.collect()
    gc.freeze()  # libraries and weights are no garbage: collections need not look at them again
    channel.send(
        Ready(
            model=loaded.name,
            context_length=engine.loaded.context_length,
            device=loaded.device,
            dtype=loaded.dtype,
            fingerprint=engine.loaded.fingerprint,
            seconds=time.monotonic() - began,
            exact=loaded.exact,
            defaults=loaded.defaults,
            token_bytes=loaded.token_bytes,
        )
    )
    return engine


def _serve(channel: Channel, engine: Engine, pace_seconds: float) -> None:
    """Alternate between commands and steps; wait for a command where there is nothing to do.

    With a pace, the running sequences wait for their turn; prompts are computed meanwhile.
    """
    spoke = turn = time.monotonic()
    while True:
        while engine.idle or channel.ready():
            if engine.idle and engine.runner.due(1) and not channel.ready(LULL_SECONDS):
                engine.runner.record()
                continue
            command = channel.receive()
            if isinstance(command, Stop):
                return
            engine.handle(command)
        early = turn - time.monotonic()
        if early > 0 and not engine.urgent:
            channel.ready(early)
            continue
        if early <= 0:
            turn = time.monotonic() + pace_seconds
        outputs = engine.step(decode=early <= 0)
        if outputs or time.monotonic() - spoke > BEAT_SECONDS:
            channel.send(Step(outputs, *engine.load()) if outputs else Busy())
            spoke = time.monotonic()
        if engine.runner.due(OFTEN):
            engine.runner.record()
