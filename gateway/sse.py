"""Server-sent events: frames, ids, the `Last-Event-ID` cursor, keep-alives, and the response."""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from starlette.responses import Response

from shared.errors import UnbrokenError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable

    from starlette.types import Receive, Scope, Send

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
        for future in (task, gone):
            future.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


class EventStreamResponse(Response):
    """Sends frames as they come, and stops producing them when the client leaves.

    Args:
        frames: the frames, in order; closed when the stream ends, for whatever reason.
        headers: more response headers.
    """

    def __init__(self, frames: AsyncIterator[bytes], headers: dict[str, str]) -> None:
        super().__init__(status_code=200, headers={**HEADERS, **headers})
        del self.headers["content-length"]  # the length is not known
        self._frames = frames

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response (ASGI)."""
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        try:
            await while_connected(receive, self._pump(send))
        except Disconnected:
            pass
        finally:
            if close := getattr(self._frames, "aclose", None):
                await close()

    async def _pump(self, send: Send) -> None:
        async for data in self._frames:
            await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
