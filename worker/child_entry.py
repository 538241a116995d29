"""The child's side of `worker.child`: loads a handler, answers requests, ends with its parent."""

from __future__ import annotations

import importlib
import os
import queue
import socket
import threading
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np

from shared import logs
from shared.errors import UnbrokenError
from worker.engine import channel
from worker.launch_entry import set_name

_LENGTH_BYTES = 8

Handler = Callable[[Any], Any]


def send(sock: socket.socket, message: object) -> None:
    """Send one message and block until the kernel has taken all of it.

    Raises:
        OSError: the other end is gone.
    """
    for part in channel.encode(message):
        sock.sendall(part)


def receive(sock: socket.socket) -> Any:
    """Wait for one message.

    Raises:
        EOFError: the other end closed.
    """
    size = int.from_bytes(_read(sock, _LENGTH_BYTES), "big")
    return channel.decode(_read(sock, size))


def _read(sock: socket.socket, size: int) -> memoryview:
    # Not a bytearray: zeroing a hundred megabytes would hold the GIL.
    data = np.empty(size, np.uint8).data
    rest = data
    while rest:
        got = sock.recv_into(rest)
        if not got:
            raise EOFError
        rest = rest[got:]
    return data


def main(sock: socket.socket, log_level: str) -> None:
    """Be the child: load the handler the first message names, then answer until the end."""
    logs.configure(log_level)
    requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
    # A thread reads, so that the parent's end is noticed while the handler is busy.
    threading.Thread(target=_read_requests, args=(sock, requests), daemon=True).start()
    target, args = requests.get()
    try:
        module, _, factory = target.partition(":")
        set_name(module.rpartition(".")[2])
        handler: Handler = getattr(importlib.import_module(module), factory)(*args)
    except Exception as error:  # noqa: BLE001  # whatever it is, the parent must know
        known = isinstance(error, UnbrokenError)
        send(sock, ("failed", str(error) if known else f"{type(error).__name__}: {error}"))
        return
    send(sock, ("ready",))
    while True:
        send(sock, _answer(handler, requests.get()))


def _read_requests(sock: socket.socket, requests: queue.SimpleQueue[Any]) -> None:
    try:
        while True:
            requests.put(receive(sock))
    except (EOFError, OSError):
        os._exit(0)


def _answer(handler: Handler, payload: Any) -> tuple[Any, ...]:
    try:
        return ("ok", handler(payload))
    except UnbrokenError as error:
        return ("refused", error.code, error.message, error.param, error.retry_after)
    except Exception as error:  # noqa: BLE001  # the same
        # Not the message: it may quote a prompt. The frames say where.
        frames = "".join(traceback.format_tb(error.__traceback__))
        return ("broke", type(error).__name__, frames)
