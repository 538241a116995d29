"""How messages travel between the worker and its engine process: frames over a socket pair.

A frame is its length (8 bytes, big-endian), the number and lengths of its raw buffers, a pickle,
and the buffers (pixel arrays), which pickle leaves out of band so that they are not copied.
Both ends are one program on one machine; nothing of a client's is unpickled but inside these types.
"""

from __future__ import annotations

import math
import pickle
import select
import socket
import struct
from typing import Any

_LENGTH = struct.Struct("!Q")
_READ_SIZE = 1 << 18


class Disconnected(Exception):  # noqa: N818  # an event, and the normal end of the engine process
    """The other end is gone."""


def encode(message: object) -> list[bytes | memoryview]:
    """Turn a message into the buffers of one frame, to be sent in order."""
    raw: list[memoryview] = []
    body = pickle.dumps(message, 5, buffer_callback=lambda b: raw.append(b.raw()))
    sizes = struct.pack(f"!Q{len(raw)}Q", len(raw), *(view.nbytes for view in raw))
    total = len(sizes) + len(body) + sum(view.nbytes for view in raw)
    return [_LENGTH.pack(total) + sizes + body, *raw]


def decode(frame: memoryview) -> Any:
    """Read a frame, without its length; arrays in the result are views of it."""
    (count,) = _LENGTH.unpack_from(frame)
    sizes = struct.unpack_from(f"!{count}Q", frame, 8)
    raw: list[memoryview] = []
    end = len(frame)
    for size in reversed(sizes):
        raw.insert(0, frame[end - size : end])
        end -= size
    return pickle.loads(frame[8 + 8 * count : end], buffers=raw)  # noqa: S301  # our own process


class FrameReader:
    """Cuts what arrives on a socket into messages, without ever waiting for the rest of one."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._buffer = bytearray()

    def read(self) -> list[Any]:
        """Return the messages that are complete by now; reads the socket once.

        Raises:
            Disconnected: the other end is gone.
        """
        try:
            data = self._sock.recv(_READ_SIZE, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return []
        except OSError as error:
            raise Disconnected from error
        if not data:
            raise Disconnected
        self._buffer += data
        return self._cut()

    def _cut(self) -> list[Any]:
        messages = []
        while len(self._buffer) >= 8:
            end = 8 + _LENGTH.unpack_from(self._buffer)[0]
            if len(self._buffer) < end:
                break
            messages.append(decode(memoryview(bytes(self._buffer[8:end]))))
            del self._buffer[:end]
        return messages


class Channel:
    """The engine's end: blocking, whole messages."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        sock.setblocking(True)
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)

    def send(self, message: object) -> None:
        """Send a message; waits while the other end is behind.

        Raises:
            Disconnected: the other end is gone.
        """
        send_frame(self._sock, encode(message))

    def ready(self, seconds: float = 0.0) -> bool:
        """Whether something has arrived (or the other end is gone); waits no longer than that."""
        return bool(self._poll.poll(math.ceil(seconds * 1000)))

    def receive(self) -> Any:
        """Return the next message; waits for it.

        Raises:
            Disconnected: the other end is gone.
        """
        (length,) = _LENGTH.unpack(self._exactly(8))
        return decode(memoryview(self._exactly(length)))

    def _exactly(self, count: int) -> bytearray:
        data = bytearray(count)
        view = memoryview(data)
        while view:
            try:
                received = self._sock.recv_into(view)
            except OSError as error:
                raise Disconnected from error
            if not received:
                raise Disconnected
            view = view[received:]
        return data


def send_frame(sock: socket.socket, frame: list[bytes | memoryview]) -> None:
    """Send a frame on a blocking socket.

    Raises:
        Disconnected: the other end is gone.
    """
    try:
        for buffer in frame:
            sock.sendall(buffer)
    except OSError as error:
        raise Disconnected from error
