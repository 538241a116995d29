"""Server-sent events: frames, ids, the `Last-Event-ID` cursor, keep-alives, and the response."""

from __future__ import annotations

import asyncio
import logging
import re
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

import msgspec
from starlette.responses import Response

from gateway import meter
from gateway.connection import SERVER_SEND, Connection
from shared import metrics
from shared.errors import UnbrokenError
from shared.protocol import Delta, Finished, Terminal, decode_event
from shared.tasks import AGAIN_SECONDS, stop

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    from starlette.types import Receive, Scope, Send

    from gateway.render import ChunkRenderer

log = logging.getLogger("unbroken.sse")

T = TypeVar("T")

SESSION_ID = re.compile(r"[A-Za-z0-9._~-]{1,128}")
RETRY_MS = 1000
DONE = b"data: [DONE]\n\n"

KEEP_ALIVE = b": keep-alive\n"
"""A comment and one newline: a blank line after it would be an event without data, which makes
openai-python fail once it has seen an id."""

HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",
}


@dataclass(frozen=True)
class Cursor:
    """A place in a session's log: the client has seen everything up to `index`."""

    session_id: str
    index: int


def parse_cursor(value: str | None) -> Cursor | None:
    """Parse `Last-Event-ID`: `<session_id>:<index>`; None where the client sent none.

    Raises:
        UnbrokenError: `invalid_value`, where it is not of that form.
    """
    if value is None or value == "":
        return None
    session_id, _, index = value.rpartition(":")
    if SESSION_ID.fullmatch(session_id) and re.fullmatch(r"[0-9]{1,12}", index):
        return Cursor(session_id, int(index))
    raise UnbrokenError(
        "invalid_value", "Last-Event-ID must be '<session_id>:<index>'.", "Last-Event-ID"
    )


def frame(session_id: str, index: int, data: bytes) -> bytes:
    """Return the frame of event `index`; the first one also sets the reconnection time."""
    retry = b"retry: %d\n" % RETRY_MS if index == 0 else b""
    return b"id: %s:%d\n%sdata: %s\n\n" % (session_id.encode(), index, retry, data)


def bare_frame(data: bytes) -> bytes:
    """Return a frame without an id: it is no place to resume from."""
    return b"data: %s\n\n" % data


class Rendering(Protocol):
    """Renders the entries of one session's log for clients: see `Frames.render`."""

    @property
    def identity(self) -> Hashable:
        """Equal for those that give the same bytes for the same entries."""

    def render(self, first: int, events: Sequence[bytes], seen: int = -1) -> tuple[bytes, bool]:
        """Return the frames of the entries from index `first` on, and whether the session ends."""


class Frames:
    """Renders the entries of one session's log as frames, without decoding those of plain deltas.

    A delta's text lies in the log as JSON already, and goes into the frame as it is. All followers
    whose `identity` is equal can share one.

    Args:
        session_id: stands in the ids.
        renderer: makes the data.
    """

    __slots__ = ("_around", "_id", "_renderer", "_session_id", "identity")

    def __init__(self, session_id: str, renderer: ChunkRenderer) -> None:
        self.identity = renderer.identity
        self._session_id, self._renderer = session_id, renderer
        self._id = b"id: %s:" % session_id.encode()
        self._around: dict[tuple[bytes, bytes], list[bytes]] = {}

    def render(self, first: int, events: Sequence[bytes], seen: int = -1) -> tuple[bytes, bool]:
        """Return the frames of the events from index `first` on, and whether the session ends.

        Those up to index `seen` get no frames. The end brings what follows it: usage, where it was
        asked for, and `[DONE]`.

        Raises:
            msgspec.ValidationError: an event is not of this version.
        """
        meter.delivered(self._session_id, first, len(events))
        out: list[bytes] = []
        for index, data in enumerate(events, first):
            if data.startswith(b'["d",') and index:
                if index > seen:
                    self._add_delta(out, index, data)
                continue
            event = decode_event(data)
            if index > seen:
                out.append(frame(self._session_id, index, self._renderer.chunk(event)))
            if isinstance(event, Terminal):
                if self._renderer.include_usage and isinstance(event, Finished):
                    out.append(bare_frame(self._renderer.usage_chunk(event.usage)))
                out.append(DONE)
                return b"".join(out), True
        return b"".join(out), False

    def _add_delta(self, out: list[bytes], index: int, data: bytes) -> None:
        """Add a delta's frame: `["d",<choice>,[<ids>],"<text>","<channel>"]`, cut and pasted."""
        ids = data.find(b",[", 5)
        end = data.rfind(b',"')
        around = self._around.get((data[5:ids], data[end:]))
        if around is None:
            around = self._learn(data, data[5:ids], data[end:])
            if around is None:
                chunk = self._renderer.chunk(decode_event(data))
                out.append(frame(self._session_id, index, chunk))
                return
        text = data[data.find(b"],", ids) + 2 : end]
        out += (self._id, b"%d" % index, text.join(around))

    def _learn(self, data: bytes, choice: bytes, channel: bytes) -> list[bytes] | None:
        """Learn what surrounds the text of such deltas; None if they have more than is known."""
        delta = decode_event(data)
        if not isinstance(delta, Delta) or channel != b',"%s"]' % delta.channel.encode():
            return None
        first, *middle, last = self._renderer.around_text(delta.choice, delta.channel)
        around = [b"\ndata: " + first, *middle, last + b"\n\n"]
        self._around[choice, channel] = around
        return around


def error_frames(error: UnbrokenError) -> bytes:
    """Return how a stream ends that cannot go on: an error without an id, and `[DONE]`."""
    metrics.ERRORS.labels(error.code).inc()
    return bare_frame(msgspec.json.encode(error.body())) + DONE


class Disconnected(Exception):  # noqa: N818 - a signal, not a fault
    """The client left before its answer was complete."""


async def _until_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def while_connected(receive: Receive, work: Awaitable[T]) -> T:
    """Await `work`, and cancel it when the client leaves.

    Raises:
        Disconnected: the client left first.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_until_disconnect(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise Disconnected
    finally:
        await stop(task, gone)


class _Work:
    """What the current task does until `end`: it can be cancelled by others."""

    __slots__ = ("_task",)

    def __init__(self) -> None:
        self._task = asyncio.current_task()

    def cancel(self, *_done: object) -> None:
        """Cancel it, again and again: see `shared.tasks.stop`."""
        if self._task is not None:
            self._task.cancel()
            self._task.get_loop().call_later(AGAIN_SECONDS, self.cancel)

    def forget_cancels(self) -> None:
        """Make the task fit for further work."""
        while self._task is not None and sys.version_info >= (3, 11) and self._task.uncancel():
            pass

    def end(self) -> None:
        """Let the task be."""
        self._task = None


Source = Callable[[Connection], Awaitable[None]]
"""Writes a whole stream's frames to a connection; cancelled when the client leaves."""


class EventStreamResponse(Response):
    """A stream of events; whatever goes wrong in it becomes its last event.

    Args:
        source: writes the frames, up to `[DONE]`.
        headers: more response headers.
        render_error: returns how a stream ends that cannot go on.
    """

    def __init__(
        self,
        source: Source,
        headers: dict[str, str],
        render_error: Callable[[UnbrokenError], bytes] = error_frames,
    ) -> None:
        super().__init__(status_code=200, headers={**HEADERS, **headers})
        del self.headers["content-length"]  # the length is not known
        self._source, self._render_error = source, render_error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response (ASGI)."""
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        self.raw_headers = []  # sent, and of no use to a stream that may stay for an hour
        # As `while_connected` does, with a task less for each of thousands of streams.
        work = _Work()
        gone = asyncio.ensure_future(_until_disconnect(receive))
        gone.add_done_callback(work.cancel)
        try:
            await self._run(Connection(scope.get(SERVER_SEND, send)))
        except asyncio.CancelledError:
            if not gone.done():
                raise
            work.forget_cancels()
            return
        finally:
            work.end()
            gone.cancel()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _run(self, connection: Connection) -> None:
        try:
            await self._source(connection)
        except UnbrokenError as error:  # too late for a status
            await connection.write(self._render_error(error))
        except Exception:
            log.exception("a stream failed")
            unknown = UnbrokenError("internal_error", "The server failed unexpectedly.")
            await connection.write(self._render_error(unknown))
