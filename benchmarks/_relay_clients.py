"""Clients that read event streams, check every id, and time each event; a process of their own.

Plain sockets and one epoll: reading thousands of streams must cost less than serving them. Talks
with its parent in JSON lines: `connected` once each stream has its first event, then for a window
`{"begin", "end"}` (seconds of the monotonic clock) what came in it.
"""

from __future__ import annotations

import json
import re
import select
import socket
import sys
import time
from array import array

import msgspec

EVENT = re.compile(
    rb'id: [^:\n]+:(\d+)\n(?:retry: \d+\n)?data: .*?"content":"([\d.]*) *"[^\n]*\n\n'
)
CONNECT_AT_ONCE = 50


class Plan(msgspec.Struct):
    """The streams to open: request heads and bodies, and the port they go to; some do not read."""

    port: int
    requests: list[str]
    receive_buffer: int = 0
    reads: bool = True


class Stream:
    """One open stream."""

    def __init__(self, plan: Plan, request: str) -> None:
        self.socket = socket.socket()
        if plan.receive_buffer:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, plan.receive_buffer)
        self.socket.connect(("127.0.0.1", plan.port))
        self.socket.sendall(request.encode())
        self.socket.setblocking(False)
        self.next = 0
        self.in_body = False
        self.chunk = 0  # bytes of the current chunk that are still to come, its CRLF included
        self.raw = b""
        self.text = b""

    def feed(self, data: bytes) -> bytes:
        """Take bytes off the wire; return the body's bytes in them (chunked encoding)."""
        raw = self.raw + data
        size, _, piece = raw.partition(b"\r\n")
        if self.in_body and not self.chunk and len(piece) == int(size or b"0", 16) + 2:
            self.raw = b""  # one whole chunk, as most often
            return piece[:-2]
        if not self.in_body:
            head, found, raw = raw.partition(b"\r\n\r\n")
            if not found:
                self.raw = head
                return b""
            if not head.startswith(b"HTTP/1.1 200"):
                raise RuntimeError((head + raw)[:2000].decode(errors="replace"))
            self.in_body = True
        body, at = [], 0
        while at < len(raw):
            if not self.chunk:
                line = raw.find(b"\r\n", at)
                if line < 0:
                    break
                self.chunk = int(raw[at:line], 16) + 2
                at = line + 2
            piece = raw[at : at + self.chunk]
            self.chunk -= len(piece)
            at += len(piece)
            body.append(piece[: len(piece) - max(0, 2 - self.chunk)] if self.chunk < 2 else piece)
        self.raw = raw[at:]
        return b"".join(body)


class Clients:
    """All streams of this process."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.poll = select.epoll()
        self.streams: dict[int, Stream] = {}
        self.connected = self.events = self.gaps = self.closed = 0
        self.begin, self.end = 0.0, 0.0
        self.latencies = array("d")

    def open(self) -> None:
        """Open all streams, and wait until each has had its first event."""
        for number, request in enumerate(self.plan.requests, 1):
            stream = Stream(self.plan, request)
            self.streams[stream.socket.fileno()] = stream
            self.poll.register(stream.socket.fileno(), select.EPOLLIN)
            while self.connected < number - CONNECT_AT_ONCE:
                self.turn()
        while self.connected < len(self.streams):
            self.turn()
        if not self.plan.reads:
            for descriptor in self.streams:
                self.poll.unregister(descriptor)

    def turn(self, timeout: float = 0.1) -> None:
        """Read what there is."""
        for descriptor, _ in self.poll.poll(timeout):
            if descriptor in self.streams:
                self.read(self.streams[descriptor])

    def read(self, stream: Stream) -> None:
        """Read one stream; count and time its events."""
        try:
            data = stream.socket.recv(65536)
        except BlockingIOError:  # the poll was mistaken
            return
        now = time.monotonic()
        if not data:
            self.closed += 1
            self.poll.unregister(stream.socket.fileno())
            return
        text = stream.text + stream.feed(data)
        at = 0
        for found in EVENT.finditer(text):
            at = found.end()
            index, sent = found.groups()
            if int(index) != stream.next:
                self.gaps += 1
            elif not stream.next:
                self.connected += 1
            stream.next = int(index) + 1
            if self.begin <= now < self.end:
                self.events += 1
                if sent:
                    self.latencies.append(now - float(sent))
        stream.text = text[at:]

    def window(self, begin: float, end: float) -> dict[str, object]:
        """Measure from `begin` to `end`; latencies are sorted, in seconds."""
        self.begin, self.end = begin, end
        self.events, self.latencies = 0, array("d")
        while time.monotonic() < end + 0.3:
            self.turn()
        ordered = sorted(self.latencies)
        return {
            "events": self.events,
            "gaps": self.gaps,
            "closed": self.closed,
            "latencies": [round(x, 6) for x in ordered],
        }


def main() -> None:
    """Do what the lines on stdin say; the first one is the plan."""
    clients = Clients(msgspec.json.decode(sys.stdin.readline(), type=Plan))
    clients.open()
    print(json.dumps({"connected": clients.connected}), flush=True)
    clients.poll.register(sys.stdin.fileno(), select.EPOLLIN)
    while True:
        for descriptor, _ in clients.poll.poll():
            if descriptor != sys.stdin.fileno():
                clients.read(clients.streams[descriptor])
                continue
            line = sys.stdin.readline()
            if not line:
                return
            clients.poll.unregister(descriptor)
            print(json.dumps(clients.window(**json.loads(line))), flush=True)
            clients.poll.register(descriptor, select.EPOLLIN)


if __name__ == "__main__":
    main()
